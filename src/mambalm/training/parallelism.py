"""A model spread over ranks, from outside it: by module class, never by attributes stuck on tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mambalm.layers import Block, Mamba, Mamba2
from mambalm.models.common import MambalmForCausalLM
from mambalm.training.distributed import Ranks
from mambalm.training.parts import put_parts, take_parts
from mambalm.training.precision import Policy

if TYPE_CHECKING:
    from mambalm.training.recipe import ParallelSection

# The matrices of a block, which are nearly all of its numbers: gathered in the dtype of the products. What else it has
# stays float32, A_log, D and the bias of Δ above all.
_LARGE = ("in_proj", "out_proj", "fc1", "fc2")
# What "selective" keeps in blocks whose mixer has no recomputation of its own: what costs more than passes over memory.
_COSTLY = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product", "mambalm::ssd")


def is_sharded(section: ParallelSection) -> bool:
    """Whether no rank holds the whole model."""
    return section.mode in ("fsdp", "hsdp")


def parallelise(
    network: MambalmForCausalLM, section: ParallelSection, precision: Policy, ranks: Ranks, *, seed: int = 0
) -> nn.Module:
    """The network on its device, recomputing, compiled and spread as the section says.

    Args:
        network: float32; one that is to be sharded also in another dtype, or not drawn yet and on meta.
        section: how it is spread.
        precision: of compute and of sums over ranks.
        ranks: who takes part.
        seed: of the initial values of one on the meta device, which are those of one that is made whole.

    Raises:
        ValueError: several ranks without a mode that uses them, or one that needs them; or compile where it cannot be.
    """
    if (section.mode == "single") != (ranks.world == 1):
        here = "one rank" if ranks.world == 1 else f"{ranks.world} ranks"
        raise ValueError(
            f"parallel.mode is {section.mode}, and this is {here}: use single for one, and ddp, fsdp or hsdp under "
            "torchrun"
        )
    if not is_sharded(section):
        moved: nn.Module = network
        moved.to(ranks.device)
    _recompute(network, section.checkpointing, section.compile)
    if section.compile:
        _compile(network, section)
    if section.mode == "ddp":
        spread = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
        if precision.reduce_dtype == torch.float16:
            spread.register_comm_hook(None, fp16_compress_hook)
        return spread
    return _shard(network, _mesh(section, ranks), precision, seed) if is_sharded(section) else network


def _recompute(network: MambalmForCausalLM, checkpointing: str, compiled: bool = False) -> None:
    """Mixers that can compute what they keep again do so themselves, not under torch.compile; the others' blocks are
    checkpointed."""
    blocks: Any = network.backbone.layers
    for block in blocks:
        own = isinstance(block.mixer, Mamba) or (isinstance(block.mixer, Mamba2) and not compiled)
        if own:
            block.mixer.recompute = checkpointing == "selective"
        if isinstance(block.mixer, Mamba) and block.mlp is None and checkpointing == "full" and not compiled:
            block.mixer.recompute = "layer"
        elif checkpointing == "full" or (checkpointing == "selective" and not own):
            what: Any = {"context_fn": _keep_costly} if checkpointing == "selective" else {}
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, **what)


def _compile(network: MambalmForCausalLM, section: ParallelSection) -> None:
    """Block by block; sharded, what is in them: FSDP2's hooks on the matrices break a block's graph.

    Around such a block checkpointing, which cannot have breaks inside, would leave nothing compiled, without a word.

    Raises:
        ValueError: checkpointing would keep results that compiled code writes over.
    """
    blocks: Any = network.backbone.layers
    for block in blocks:
        if not is_sharded(section):
            block.compile()
            continue
        if section.checkpointing == "selective" and not isinstance(block.mixer, Mamba):
            raise ValueError(
                f"parallel.compile with parallel.checkpointing=selective is not possible in sharded blocks of "
                f"{type(block.mixer).__name__}: use full or none, or do without compile"
            )
        for module in (block.mixer, block.mlp):
            if module is not None:
                module.compile()


def _keep_costly() -> Any:
    return create_selective_checkpoint_contexts(_decide)


def _decide(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    kept = str(getattr(operator, "name", lambda: "")()).startswith(_COSTLY)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _mesh(section: ParallelSection, ranks: Ranks) -> DeviceMesh:
    """All ranks, or groups of them that hold copies of one another."""
    kind = ranks.device.type
    if section.mode == "fsdp":
        return init_device_mesh(kind, (ranks.world,), mesh_dim_names=("shard",))
    size = section.shard_size or torch.accelerator.device_count() or ranks.world
    if ranks.world % size:
        raise ValueError(f"parallel.shard_size={size} must divide the {ranks.world} ranks")
    return init_device_mesh(kind, (ranks.world // size, size), mesh_dim_names=("replicate", "shard"))


def _shard(network: MambalmForCausalLM, mesh: DeviceMesh, precision: Policy, seed: int = 0) -> nn.Module:
    """FSDP2: per block a group of its large projections in the dtype of the products; all else one float32 group.

    The last is gathered once a step and stays, 0.25 GB of a 1.4b: one for each block would double the exchanges.
    """
    parts = take_parts(network, mesh, seed)
    full = MixedPrecisionPolicy(reduce_dtype=precision.reduce_dtype, cast_forward_inputs=False)
    # A block may return views, of which nothing is changed in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    half = MixedPrecisionPolicy(param_dtype=precision.compute_dtype, reduce_dtype=precision.reduce_dtype)
    blocks: Any = network.backbone.layers
    groups: list[Any] = []
    for block in blocks:
        large = list(_large(block))
        fully_shard(large, mesh=mesh, mp_policy=half)
        groups.append(large[0])
    for group, following in pairwise(groups):
        # Where the host is not far ahead, the next block's weights would be waited for.
        group.set_modules_to_forward_prefetch([following])
    fully_shard(network, mesh=mesh, mp_policy=full)
    put_parts(network, parts, precision.device)
    return network


def _large(block: Block) -> Iterator[nn.Module]:
    for inner in (block.mixer, block.mlp):
        for name, module in [] if inner is None else inner.named_children():
            if name in _LARGE:
                yield module
