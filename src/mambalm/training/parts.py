"""The values of a model that is never whole on the CPU: a rank takes its part of what is drawn or read for a moment, or
a GPU all of it, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mambalm.models.common import MambalmForCausalLM

Parts = dict[str, Tensor]


def take_parts(network: MambalmForCausalLM, mesh: DeviceMesh, seed: int) -> Parts:
    """This rank's part of every parameter, by name; the network is on the meta device then.

    Of one that was on it before, initial values are drawn from ``seed``, a block at a time. The parameters of a
    checkpoint are pages of its files, and parts of them views: only their own pages are read, by `put_parts`.
    """
    if network.backbone.get_input_embeddings().weight.is_meta:
        return {name: _part(value, mesh).clone() for name, value in draw(network, seed)}
    parts = {name: _part(parameter.detach(), mesh) for name, parameter in network.named_parameters()}
    nn.Module.to(network, "meta")
    network.tie_weights()
    return parts


def put_parts(network: MambalmForCausalLM, parts: Parts, device: torch.device) -> None:
    """Give a network that was sharded on the meta device its values, float32 on ``device``; uses the parts up."""
    for name, parameter in list(network.named_parameters()):
        local = parts.pop(name).to(device, torch.float32)
        if local.untyped_storage().nbytes() > local.nbytes:  # still a view
            local = local.clone()
        assert isinstance(parameter, DTensor)
        value = DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        _assign(network, name, value)
    network.tie_weights()


def put_whole(network: MambalmForCausalLM, seed: int, device: torch.device) -> None:
    """Give a network on the meta device the initial values of one made whole after this seed, on ``device``."""
    values = {name: value.to(device, copy=True) for name, value in draw(network, seed)}
    for name, _ in list(network.named_parameters()):
        _assign(network, name, values.pop(name))
    network.tie_weights()


def _assign(network: nn.Module, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    network.get_submodule(module).load_state_dict({leaf: value}, strict=False, assign=True)


@torch.no_grad()
def draw(network: MambalmForCausalLM, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The initial values of a network on the meta device, bit for bit those of one made whole after this seed.

    One block, or the embeddings, is held at a time. What constructors draw is replaced by the initialisation after
    them, but it has to be drawn: torch's generator on the CPU cannot jump.
    """
    backbone: Any = network.backbone
    vocabulary, width = backbone.embeddings.weight.shape
    torch.manual_seed(seed)
    nn.Embedding(vocabulary, width)
    for index in range(len(backbone.layers)):
        backbone.make_block(network.config, index)
    pieces = {"embeddings": backbone.embeddings, **{f"layers.{i}": block for i, block in enumerate(backbone.layers)}}
    for name, piece in (pieces | {"norm_f": backbone.norm_f}).items():
        yield from _initial(f"backbone.{name}", piece, backbone._init_weights)
    nn.Linear(width, vocabulary, bias=False)
    # Of a tied head too, which is drawn before it is tied.
    yield from _initial("lm_head", network.lm_head, network._init_weights)
    network.tie_weights()


def _initial(prefix: str, piece: nn.Module, initialise: Callable[[nn.Module], None]) -> Iterator[tuple[str, Tensor]]:
    piece.to_empty(device="cpu")
    piece.apply(initialise)
    for name, parameter in piece.named_parameters():
        yield f"{prefix}.{name}", parameter.detach()
    piece.to("meta")


def _part(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows that FSDP2 gives this rank, of the mesh's last dimension."""
    rows = value.chunk(mesh.size(-1))
    number = mesh.get_local_rank(mesh.ndim - 1)
    return rows[number] if number < len(rows) else value[:0]
