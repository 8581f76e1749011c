"""ssd on Hopper GPUs: outputs by a kernel in Gluon where it takes their shape, all else by plain Triton."""

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mambalm.ops import gluon_support
from mambalm.ops.backends import Call
from mambalm.ops.gluon_support import gl
from mambalm.ops.ssd import _gluon_kernels, _launch
from mambalm.ops.ssd import triton as plain
from mambalm.ops.ssd._launch import Problem, checkpoint_shape, skip_strides
from mambalm.ops.ssd.arguments import Arguments
from mambalm.ops.ssd.triton import Decays, Pass, States, backward
from mambalm.ops.triton_support import processors

__all__ = ["backward", "checkpoint_shape", "forward", "supports"]

# The kernel's sizes, chunks that are copied in ahead, and the shortest rows that are worth it.
_CHANNELS, _STATES, _CHUNK, _STAGES, _SHORT = 64, 128, 64, 3, 64


def supports(call: Call) -> str | None:
    """None, or why the call cannot run here."""
    reason = gluon_support.unsupported(call, lambda capability: capability == (9, 0), "9.0")
    return reason or _launch.unsupported(call)


def forward(*arguments, final: bool, save: bool) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """y, the final state (empty unless asked for) and an empty tensor; arguments as in the interface."""
    return plain.run_forward(Problem.of(Arguments(*arguments)), final, scan_rows)


def takes(problem: Problem) -> bool:
    """Whether the kernel makes the outputs; it knows no gate, and rows are those of the batch."""
    given, D = problem.tensors, problem.tensors["D"]
    sizes = (problem.p, problem.n, problem.chunk) == (_CHANNELS, _STATES, _CHUNK)
    paired = problem.h // problem.g % 2 == 0
    if not sizes or not paired or problem.dtype != torch.bfloat16 or problem.l < _SHORT or not problem.rows:
        return False
    if given["z"] is not None or given["cu_seqlens"] is not None:
        return False
    return (D is None or D.ndim == 1) and all(_is_copied(given[name]) for name in "xBC")


def _is_copied(t: Tensor | None) -> bool:
    """Whether the copy engine can take (b, l, heads or groups, channels) as one matrix of tokens."""
    if t is None or t.dtype != torch.bfloat16:
        return False
    one_matrix = t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1)
    dense = t.stride(3) == 1 and (t.shape[2] == 1 or t.stride(2) == t.shape[3])
    return one_matrix and dense and t.stride(1) % 8 == 0 and t.data_ptr() % 16 == 0


def _tokens(t: Tensor, width: int) -> TensorDescriptor:
    """``t`` (b, l, heads or groups, channels) for the copy engine, in tiles of a chunk's tokens."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    shape = [t.shape[0] * t.shape[1], t.shape[2] * t.shape[3]]
    return TensorDescriptor(t, shape, [t.stride(1), 1], [_CHUNK, width], layout)


def _segments(problem: Problem) -> int:
    """Pieces of a row: as few as keep a program from waiting for the state of one before it."""
    chunks = -(-problem.l // _CHUNK)
    each = problem.rows * problem.h // 2 * chunks / processors(problem.device)
    count = 1
    while each < 0.7 * chunks / count and chunks >= 8 * count:
        count *= 2
    return count


def scan_rows(problem: Problem, decays: Decays, wanted: Pass) -> States:
    """The outputs of a forward."""
    if not takes(problem):
        return plain.scan_rows(problem, decays, wanted)
    segments, programs = _segments(problem), processors(problem.device)
    ends = plain.segment_ends(problem, decays, wanted, segments)
    per_unit = -(-(problem.slots // problem.rows) // segments)
    x, B, C, D = (problem.tensors[name] for name in "xBCD")
    y = wanted.out
    assert x is not None
    assert B is not None
    assert C is not None
    assert y is not None
    _gluon_kernels.scan[(programs,)](
        u_desc=_tokens(x, _CHANNELS),
        key_desc=_tokens(B, _STATES),
        query_desc=_tokens(C, _STATES),
        out_desc=_tokens(y, _CHANNELS),
        out=y,
        D=D,
        initial=wanted.initial,
        step=decays["step"],
        decay=decays["decay"],
        **ends,
        final=wanted.final,
        handed=problem.empty(2 * programs, _CHANNELS, _STATES),
        flags=torch.zeros(2 * programs + 1, dtype=torch.int32, device=problem.device),
        D_h=skip_strides(D)["D_h"],
        length=problem.l,
        heads=problem.h,
        per_group=problem.h // problem.g,
        slots=problem.slots,
        total=problem.rows * segments * (problem.h // 2) * per_unit,
        per_unit=per_unit,
        SEGMENTS=segments,
        STAGES=_STAGES,
        Q=_CHUNK,
        P=_CHANNELS,
        N=_STATES,
        num_warps=4,
    )
    return None, None
