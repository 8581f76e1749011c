"""The causal convolution on any GPU that Triton knows, and in Triton's interpreter on a CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambalm.ops.backends import Call
from mambalm.ops.causal_conv1d._triton_kernels import convolve_backward, convolve_forward
from mambalm.ops.triton_support import ceil_div, dense_channels, launch, on, power_of_2, processors, unsupported

# The inputs and the gradients that a program keeps in registers grow with the taps.
_MOST_TAPS = 8

# Channels of a program, its warps, and the rows that it loads together; docs/decisions/conv-and-norm-gpu.md.
_FORWARD = {"BLOCK": 256, "num_warps": 2, "ROWS": 8}
_BACKWARD = {"BLOCK": 128, "num_warps": 1, "ROWS": 8}
# Registers of a thread in the backward, of so many taps: ptxas takes more by itself, and too few programs fit side by
# side. More taps need more.
_BACKWARD_REGISTERS, _BACKWARD_REGISTERS_TAPS = 128, 4
# The fewest and the most tokens of a program; between them, as many as leave this many programs per multiprocessor.
_LEAST_TOKENS = 8
_FORWARD_MOST_TOKENS, _BACKWARD_MOST_TOKENS = 64, 128
_PROGRAMS = 16
# Parts of y whose gradients the backward reads where they lie, if they begin at blocks of channels.
PARTS = 3


def supports(call: Call) -> str | None:
    """None, or why the call cannot run here."""
    if call.sizes.get("k", 1) > _MOST_TAPS:
        return f"it takes at most {_MOST_TAPS} taps, the call has {call.sizes['k']}"
    return unsupported(call)


class _Call:
    """The arguments that both kernels take, and how the tokens are cut up."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        blocks: dict[str, int],
        most_tokens: int,
        limited: bool = False,
    ) -> None:
        x = dense_channels(x)
        b, l, d = x.shape
        k = weight.shape[1]
        columns = ceil_div(d, blocks["BLOCK"])
        documents = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
        wanted = ceil_div(b * l * columns, processors(x.device) * _PROGRAMS)
        # The rows of a batch of single tokens do not wait for each other.
        least = min(_LEAST_TOKENS, power_of_2(max(l, 1)))
        chunk = min(max(power_of_2(wanted), least), most_tokens)
        # Without a token there are still gradients of states to hand on.
        self.chunks = max(ceil_div(b * l, chunk), 1)
        self.states = (documents, d, k - 1)
        self.x = x
        self._columns = columns
        self._arguments = {
            "x": x,
            "weight": weight.contiguous(),
            "bias": None if bias is None else bias.contiguous(),
            "initial": None if initial_state is None else initial_state.contiguous(),
            "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
            "x_b": x.stride(0),
            "x_l": x.stride(1),
            "channels": d,
            "length": l,
            "documents": documents,
            "tokens": b * l,
            "chunk": chunk,
            "SILU": silu,
            "K": k,
            "PADDED": power_of_2(k),
            "BLOCK": blocks["BLOCK"],
            "ROWS": blocks["ROWS"],
        }
        self._options = {"num_warps": blocks["num_warps"]}
        if limited:
            self._options["maxnreg"] = _BACKWARD_REGISTERS

    def run(self, kernel: Any, parts: int, **more: Any) -> None:
        """Launch ``parts`` programs for each block of channels."""
        with on(self.x.device):
            launch(kernel, parts * self._columns, {**self._arguments, **more}, self._options)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the final state (s, d, k-1), both in x's dtype."""
    call = _Call(x, weight, bias, silu, initial_state, cu_seqlens, _FORWARD, _FORWARD_MOST_TOKENS)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty(call.states, dtype=x.dtype, device=x.device)
    states = call.states[0] if final.numel() else 0
    call.run(convolve_forward, call.chunks + states, y=y, final=final, chunks=call.chunks)
    return y, final


def backward(
    dy: Tensor | Sequence[Tensor],
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of x, weight, bias and initial_state. What the activation needs is computed again, not kept.

    dy may be in parts, which are joined if there are more than PARTS, or one begins within a block of channels.
    """
    d, k = weight.shape
    limited = x.is_cuda and torch.version.hip is None and k <= _BACKWARD_REGISTERS_TAPS
    call = _Call(x, weight, bias, silu, initial_state, cu_seqlens, _BACKWARD, _BACKWARD_MOST_TOKENS, limited)
    parts = _parts(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dinitial = None if initial_state is None else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    shares = torch.empty(call.chunks, k + 1, d, dtype=torch.float32, device=x.device)
    call.run(
        convolve_backward,
        call.chunks,
        **parts,
        dfinal=None if dfinal_state is None else dfinal_state.contiguous(),
        dx=dx,
        shares=shares,
        dinitial=dinitial,
    )
    # Summed in a fixed order, so that a run can be repeated bit for bit.
    sums = shares.sum(0)
    return dx, sums[:k].T.clone(memory_format=torch.contiguous_format), sums[k], dinitial


def _parts(dy: Tensor | Sequence[Tensor]) -> dict[str, Any]:
    """The parts of dy, their strides, and where all but the first begin."""
    parts = [dy] if isinstance(dy, Tensor) else [part for part in dy if part.shape[-1]]
    sizes = [part.shape[-1] for part in parts]
    if len(parts) > PARTS or any(size % _BACKWARD["BLOCK"] for size in sizes[:-1]):
        parts = [torch.cat(parts, dim=-1)]
    parts = [dense_channels(part) for part in parts]
    found: dict[str, Any] = {}
    for i in range(PARTS):
        part = parts[i] if i < len(parts) else None
        found |= {f"dy{i}": part, f"first{i}": sum(sizes[:i])}
        found |= {f"dy{i}_b": 0 if part is None else part.stride(0), f"dy{i}_l": 0 if part is None else part.stride(1)}
    del found["first0"]
    return found
