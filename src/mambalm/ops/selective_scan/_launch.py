"""What the GPU backends of the selective scan share: when they can run, what a launch is given, what comes after it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambalm.ops import triton_support
from mambalm.ops.backends import Call
from mambalm.ops.selective_scan.arguments import Arguments
from mambalm.ops.triton_sums import sums
from mambalm.ops.triton_support import dense_channels, launch, on

# Elements of u from which on fewer states are kept for the backward: memory counts, and there is work for all.
_MANY_ELEMENTS = 2**24
MOST_STATES = 256

# Rows (of the batch, or packed documents) whose shares of dA, dD and the bias gradient are kept apart and then summed
# in a fixed order; more rows take turns.
_MOST_SHARES = 64


def unsupported(call: Call) -> str | None:
    """Why no Triton kernel can run the call."""
    if call.sizes.get("n", 1) > MOST_STATES:
        return f"it takes at most {MOST_STATES} states, the call has {call.sizes['n']}"
    return triton_support.unsupported(call)


def checkpoint_shape(call: Call) -> tuple[int, ...]:
    """One state for every `checkpoint_steps` begun of every row: (pieces, d, n)."""
    b, l, d, n = (call.sizes[axis] for axis in "bldn")
    return (_pieces(b, l, d, call.sizes.get("s")), d, n)


def checkpoint_steps(b: int, l: int, d: int) -> int:
    """Steps between the states kept for the backward, which computes those between again: 4 n / steps bytes per element
    of u. The Gluon backward holds one such piece in shared memory."""
    return 32 if b * l * d >= _MANY_ELEMENTS else 16


def _pieces(b: int, l: int, d: int, documents: int | None) -> int:
    """Document i, from position p, keeps its states from piece p // steps + i on: disjoint without reading offsets."""
    steps = checkpoint_steps(b, l, d)
    return b * -(-l // steps) if documents is None else l // steps + documents


@dataclass(frozen=True)
class Problem:
    """The arguments of a call as the kernels take them."""

    tensors: dict[str, Tensor | None]
    strides: dict[str, int]
    b: int
    l: int
    d: int
    n: int
    g: int
    rows: int
    softplus: bool
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(given: Arguments) -> "Problem":
        """The call as the kernels take it."""
        (b, l, d), cu_seqlens = given.u.shape, given.cu_seqlens
        along = {"u": given.u, "delta": given.delta, "B": given.B, "C": given.C, "z": given.z}
        along = {name: None if t is None else dense_channels(t) for name, t in along.items()}
        whole = {"A": given.A, "D": given.D, "bias": given.delta_bias}
        whole |= {"initial": given.initial_state, "cu_seqlens": cu_seqlens}
        whole = {name: None if t is None else t.contiguous() for name, t in whole.items()}
        strides: dict[str, int] = {}
        for name, t in along.items():
            strides |= stride_arguments(name, t)
        rows = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
        sizes = (b, l, d, given.A.shape[1], given.B.shape[2], rows)
        return Problem(along | whole, strides, *sizes, given.delta_softplus, given.u.dtype, given.u.device)

    def shares(self, chunks: int = 1) -> int:
        """Programs per block of channels in the backward, when rows are cut into ``chunks``."""
        return min(self.rows * chunks, _MOST_SHARES)

    def blocks(self, block: int) -> int:
        """Blocks of ``block`` channels; none reaches over the border of a group."""
        return self.g * -(-self.d // self.g // block)

    def arguments(self) -> dict[str, Any]:
        """What both kernels take first, by name."""
        sizes = {"length": self.l, "channels": self.d, "states": self.n, "groups": self.g}
        sizes["per_group"] = self.d // self.g
        return {**self.tensors, **self.strides, **sizes, "SOFTPLUS": self.softplus, "PIECE": self.piece}

    @property
    def piece(self) -> int:
        """Steps between two checkpoints."""
        return checkpoint_steps(self.b, self.l, self.d)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised float32 tensor on the call's device."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def gradients(self, blocks_per_group: int, shares: int) -> "Gradients":
        """Empty buffers for a backward with that many blocks in a group and programs for a block."""

        def dense(name: str) -> Tensor | None:
            t = self.tensors[name]
            return None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)

        def if_given(name: str, *shape: int) -> Tensor | None:
            return None if self.tensors[name] is None else self.empty(*shape)

        return Gradients(
            du=dense("u"),
            ddelta=dense("delta"),
            dz=dense("z"),
            dA=self.empty(shares, self.d, self.n),
            dBC=self.empty(2, blocks_per_group, self.b, self.l, self.g, self.n),
            dD=if_given("D", shares, self.d),
            dbias=if_given("bias", shares, self.d),
            dinitial=if_given("initial", self.rows, self.d, self.n),
        )


@dataclass(frozen=True)
class Gradients:
    """What a backward kernel writes. dB and dC, as one tensor, have a share per block of channels, dA, dD and dbias one
    per program of a block: a second stage adds the shares in a fixed order, so that every run gives the same bits."""

    du: Tensor | None
    ddelta: Tensor | None
    dz: Tensor | None
    dA: Tensor
    dBC: Tensor
    dD: Tensor | None
    dbias: Tensor | None
    dinitial: Tensor | None

    def result(self, problem: Problem) -> tuple[Tensor | None, ...]:
        """In the order of the interface, dB and dC in the dtypes of B and C."""
        given, float32 = problem.tensors, torch.float32
        dtypes = [float32 if (t := given[name]) is None else t.dtype for name in "BC"] + [float32] * 3
        dB, dC, dA, dD, dbias = sums([*self.dBC.unbind(), self.dA, self.dD, self.dbias], dtypes)
        return self.du, self.ddelta, dA, dB, dC, dD, self.dz, dbias, self.dinitial


def stride_arguments(name: str, t: Tensor | None) -> dict[str, int]:
    """The strides of all axes but the last, named by the axis: b, l and, of B and C, g."""
    axes: Sequence[str] = "blg" if name in "BC" else "bl"
    return {f"{name}_{axis}": 0 if t is None else t.stride(i) for i, axis in enumerate(axes)}


def launch_forward(
    kernel: Any, problem: Problem, save: bool, options: dict[str, Any], *, BLOCK: int, chunks: int = 1, **meta: Any
) -> tuple[Tensor, ...]:
    """y, the final state and the checkpoints (empty unless ``save``), by a kernel for blocks of ``BLOCK`` channels that
    cuts each row into ``chunks``."""
    y = torch.empty(problem.b, problem.l, problem.d, dtype=problem.dtype, device=problem.device)
    final = problem.empty(problem.rows, problem.d, problem.n)
    documents = None if problem.tensors["cu_seqlens"] is None else problem.rows
    pieces = _pieces(problem.b, problem.l, problem.d, documents)
    checkpoints = problem.empty(pieces, problem.d, problem.n) if save else None
    with on(problem.device):
        arguments = problem.arguments() | {"y": y, "final": final, "checkpoints": checkpoints, "BLOCK": BLOCK} | meta
        launch(kernel, problem.blocks(BLOCK) * problem.rows * chunks, arguments, options)
    return y, final, problem.empty(0) if checkpoints is None else checkpoints


def launch_backward(
    kernel: Any,
    problem: Problem,
    dy: Tensor,
    dfinal: Tensor | None,
    checkpoints: Tensor,
    options: dict[str, Any],
    *,
    BLOCK: int,
    chunks: int = 1,
    **meta: Any,
) -> tuple[Tensor | None, ...]:
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state."""
    shares = problem.shares(chunks)
    gradients = problem.gradients(problem.blocks(BLOCK) // problem.g, shares)
    dy = dense_channels(dy)
    with on(problem.device):
        arguments = problem.arguments() | vars(gradients) | stride_arguments("dy", dy) | meta
        arguments |= {"dfinal": None if dfinal is None else dfinal.contiguous(), "dy": dy, "checkpoints": checkpoints}
        arguments |= {"tokens": problem.b * problem.l, "rows": problem.rows, "shares": shares, "BLOCK": BLOCK}
        launch(kernel, problem.blocks(BLOCK) * shares, arguments, options)
    return gradients.result(problem)
