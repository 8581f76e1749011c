"""A model spread over ranks, from outside it: by module class, never by attributes stuck on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mambalm.layers import Mamba
from mambalm.models.common import MambalmForCausalLM
from mambalm.training.distributed import Ranks
from mambalm.training.precision import Policy

if TYPE_CHECKING:
    from mambalm.training.recipe import ParallelSection

# The matrices worth a gathering of their own in half precision; what else a mixer has stays float32.
_LARGE = ("in_proj", "out_proj")


def parallelise(network: MambalmForCausalLM, section: ParallelSection, precision: Policy, ranks: Ranks) -> nn.Module:
    """The network on its device, recomputing, compiled and spread as the section says.

    Raises:
        ValueError: several ranks without a mode that uses them, or one that needs them.
    """
    if (section.mode == "single") != (ranks.world == 1):
        raise ValueError(
            f"parallel.mode is {section.mode} and there are {ranks.world} ranks: use single for one, and ddp, fsdp or "
            "hsdp under torchrun"
        )
    moved: nn.Module = network
    moved.to(ranks.device)
    _recompute(network, section.checkpointing)
    if section.compile:
        for block in network.backbone.layers:
            block.compile()
    if section.mode == "ddp":
        spread = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
        if precision.reduce_dtype == torch.float16:
            spread.register_comm_hook(None, fp16_compress_hook)
        return spread
    return network if section.mode == "single" else _shard(network, _mesh(section, ranks), precision)


def _recompute(network: MambalmForCausalLM, checkpointing: str) -> None:
    if checkpointing == "full":
        network.gradient_checkpointing_enable({"use_reentrant": False})
    for module in network.modules():
        if isinstance(module, Mamba):
            module.recompute = checkpointing == "selective"


def _mesh(section: ParallelSection, ranks: Ranks) -> DeviceMesh:
    """All ranks, or groups of them that hold copies of one another."""
    kind = ranks.device.type
    if section.mode == "fsdp":
        return init_device_mesh(kind, (ranks.world,), mesh_dim_names=("shard",))
    size = section.shard_size or torch.accelerator.device_count() or ranks.world
    if ranks.world % size:
        raise ValueError(f"parallel.shard_size={size} must divide the {ranks.world} ranks")
    return init_device_mesh(kind, (ranks.world // size, size), mesh_dim_names=("replicate", "shard"))


def _shard(network: MambalmForCausalLM, mesh: DeviceMesh, precision: Policy) -> nn.Module:
    """FSDP2: per block one group of large projections in the dtype of the products, and one float32 group."""
    full = MixedPrecisionPolicy(reduce_dtype=precision.reduce_dtype, cast_forward_inputs=False)
    half = MixedPrecisionPolicy(param_dtype=precision.compute_dtype, reduce_dtype=precision.reduce_dtype)
    for block in network.backbone.layers:
        mixer: Any = block.mixer
        for name in _LARGE:
            fully_shard(getattr(mixer, name), mesh=mesh, mp_policy=half)
        fully_shard(block, mesh=mesh, mp_policy=full)
    fully_shard(network, mesh=mesh, mp_policy=full)
    return network
