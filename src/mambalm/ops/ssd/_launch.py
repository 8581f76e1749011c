"""What the GPU backends of ssd share: when they can run, what a launch is given, how the work is cut."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambalm.ops import triton_support
from mambalm.ops.backends import Call
from mambalm.ops.ssd.arguments import Arguments
from mambalm.ops.triton_support import dense_channels, power_of_2, processors

MOST_STATES = 256


def unsupported(call: Call) -> str | None:
    """Why no Triton kernel can run the call."""
    if call.sizes.get("n", 1) > MOST_STATES:
        return f"it takes at most {MOST_STATES} states, the call has {call.sizes['n']}"
    return triton_support.unsupported(call)


def checkpoint_shape(call: Call) -> tuple[int, ...]:
    """Nothing is kept for the backward: computing the states again costs less than the memory to keep them."""
    return (0,)


@dataclass(frozen=True)
class Problem:
    """The arguments of a call as the kernels take them."""

    tensors: dict[str, Tensor | None]
    b: int
    l: int
    h: int
    p: int
    g: int
    n: int
    rows: int
    chunk: int  # tokens of a chunk, Q
    limits: dict[str, Any]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(given: Arguments) -> "Problem":
        """The call as the kernels take it."""
        (b, l, h, p), (g, n) = given.x.shape, given.B.shape[2:]
        along = {"x": given.x, "B": given.B, "C": given.C, "z": given.z}
        along = {name: None if t is None else dense_channels(t) for name, t in along.items()}
        whole = {"A": given.A, "bias": given.dt_bias, "initial": given.initial_state, "cu_seqlens": given.cu_seqlens}
        whole = {name: None if t is None else t.contiguous() for name, t in whole.items()}
        rows = b if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1
        limits = {"least": given.dt_min, "most": given.dt_max, "SOFTPLUS": given.dt_softplus}
        chunk = _chunk(given.x.dtype, n, given.chunk_size)
        tensors = {**along, **whole, "dt": given.dt, "D": given.D}
        return Problem(tensors, b, l, h, p, g, n, rows, chunk, limits, given.x.dtype, given.x.device)

    @functools.cached_property
    def slots(self) -> int:
        """Places for chunks. Document i, from token t, has those from t // chunk + i on: disjoint whatever the offsets,
        which the host does not read."""
        if self.tensors["cu_seqlens"] is None:
            return self.b * -(-self.l // self.chunk)
        return self.l // self.chunk + self.rows

    @functools.cached_property
    def exact(self) -> bool:
        """Whether sums of log decays are kept in two parts, and none is the difference of two longer ones."""
        return self.dtype != torch.bfloat16

    @functools.cached_property
    def wide(self) -> int:
        """Channels of a block; a head of more has several."""
        most = 32 if self.exact else 64
        return max(min(power_of_2(self.p), most), 16)

    @functools.cached_property
    def blocks(self) -> int:
        """Blocks of channels of all heads."""
        return self.h * -(-self.p // self.wide)

    @functools.cached_property
    def tiles(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels with matrix products."""
        operand, precision = operands(self.dtype)
        states = max(power_of_2(self.n), 16)
        return {"Q": self.chunk, "P": self.wide, "N": states, "OPERAND": operand, "PRECISION": precision}

    @functools.cached_property
    def short(self) -> bool:
        """Whether every row is one chunk: its states are given from outside, and kept as they are."""
        return self.l <= self.chunk

    def sizes(self) -> dict[str, int]:
        """What those kernels take as numbers."""
        sizes = {"length": self.l, "heads": self.h, "per_group": self.h // self.g, "slots": self.slots}
        return {**sizes, "channels": self.p, "state_size": self.n}

    def segments(self) -> int:
        """Pieces of a row that are scanned side by side: as few as give every multiprocessor something to do, since all
        but one are gone through twice."""
        chunks = self.b * self.l / max(self.rows, 1) / self.chunk
        count = 1
        while self.rows * self.blocks * count < processors(self.device) and chunks >= 8 * count:
            count *= 2
        return count

    def shares(self, parts: int) -> int:
        """Programs that divide the blocks of a group between them, where chunks of ``parts`` programs are too few."""
        wanted = 2 * processors(self.device) // max(self.slots * self.g * parts, 1)
        return max(min(wanted, self.blocks // self.g), 1)

    def stages(self, each: int, besides: int, most: int) -> int:
        """Chunks in flight for which shared memory has room, of ``each`` elements, ``besides`` others."""
        size = 2 if self.tiles["OPERAND"] == tl.bfloat16 else 4
        return max(min((triton_support.shared_memory(self.device) // size - besides) // each, most), 1)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor on the call's device."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def kept_states(self) -> tuple[Tensor, Tensor | None]:
        """Room for the states of all chunks and, where they are kept in 16 bits, their scales and their inputs'."""
        tiles = self.tiles
        shape = (self.slots, self.blocks, tiles["N"])
        if self.exact or self.short:
            return self.empty(*shape, tiles["P"]), None
        return self.empty(*shape, tiles["P"], dtype=torch.float16), self.empty(self.slots, self.blocks, 2)

    def shared_gradients(self, shares: int) -> dict[str, Tensor | None]:
        """Room for the shares of programs in the gradients of B and C (shares, b, l, g, n)."""
        dtype = self.dtype if shares == 1 else torch.float32
        dBC = self.empty(2, shares, self.b, self.l, self.g, self.n, dtype=dtype)
        return {"dB": dBC[0], "dC": dBC[1]}

    def new_states(self) -> Tensor:
        """A state of each row."""
        return self.empty(self.rows, self.h, self.p, self.n)


def operands(dtype: torch.dtype) -> tuple[Any, str]:
    """What matrix products are given, and how exact they are.

    float16 has too little range for states and their gradients, and goes the way of float32. The interpreter computes
    no products of bfloat16.
    """
    if dtype == torch.bfloat16 and not triton.knobs.runtime.interpret:
        return tl.bfloat16, "ieee"
    if torch.version.hip is not None:
        return tl.float32, "ieee"
    return tl.float32, "tf32x3"


def _chunk(dtype: torch.dtype, n: int, most: int | None) -> int:
    """Tokens of a chunk, a power of two of at least 16; float32 operands take twice the room of bfloat16's."""
    best = 64 if dtype == torch.bfloat16 else 32
    if n > 128:
        best //= 2
    return best if most is None else max(min(best, 1 << most.bit_length() - 1), 16)


def stride_arguments(name: str, t: Tensor | None, axes: str) -> dict[str, int]:
    """The strides of the first axes, named by the axis."""
    return {f"{name}_{axis}": 0 if t is None else t.stride(i) for i, axis in enumerate(axes)}


def skip_strides(D: Tensor | None) -> dict[str, int]:
    """D's strides by head and channel, of (h) as of (h, p)."""
    if D is None:
        return {"D_h": 0, "D_p": 0}
    return {"D_h": D.stride(0), "D_p": D.stride(1) if D.ndim == 2 else 0}
