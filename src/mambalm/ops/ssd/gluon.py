"""ssd on Hopper GPUs: outputs and gradients by kernels in Gluon where they know the shape, else by plain Triton."""

import functools
from typing import Any

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
from mambalm.ops.ssd.triton import Decays, Pass, States
from mambalm.ops.triton_support import launch, on, processors

__all__ = ["backward", "checkpoint_shape", "forward", "supports"]

# The kernels' sizes, chunks or heads that are copied in ahead, and the shortest rows that are worth it.
_CHANNELS, _STATES, _CHUNK, _STAGES, _SHORT = 64, 128, 64, 3, 64
# What a program of the gradients takes beside its heads, in the time of one.
_BESIDE = 4
# What it leaves of a head: of what crosses tokens, what outputs read, and what reaches outputs and comes from inputs.
_LINES = plain.Lines(crossings=3, others=1, some=_CHANNELS)


def supports(call: Call) -> str | None:
    """None, or why the call cannot run here."""
    reason = gluon_support.unsupported(call.device, lambda capability: capability == (9, 0), "9.0")
    return reason or _launch.unsupported(call)


def forward(*arguments, final: bool, save: bool) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """y, the final state (empty unless asked for) and an empty tensor; arguments as in the interface."""
    return plain.run_forward(Problem.of(Arguments(*arguments)), final, scan_rows)


def backward(dy: Tensor, dfinal_state: Tensor | None, *arguments) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """The gradients of x, dt, A, B, C, D, z, dt_bias and initial_state."""
    *inputs, _ = arguments
    problem = Problem.of(Arguments(*inputs))
    if problem.short or not fits(problem):
        return plain.run_backward(problem, dy, dfinal_state, plain.scan_rows)
    return _backward(problem, dy if _is_copied(dy) else dy.contiguous(), dfinal_state)


def fits(problem: Problem) -> bool:
    """Whether the kernels know the sizes and tensors of a call; they know no gate."""
    given, D = problem.tensors, problem.tensors["D"]
    sizes = (problem.p, problem.n, problem.chunk) == (_CHANNELS, _STATES, _CHUNK)
    if not sizes or problem.dtype != torch.bfloat16 or problem.l < _SHORT or not problem.rows or given["z"] is not None:
        return False
    return (D is None or D.ndim == 1) and all(_is_copied(given[name]) for name in "xBC")


def takes(problem: Problem) -> bool:
    """Whether the kernel makes the outputs: heads are paired, and rows are those of the batch."""
    return fits(problem) and problem.h // problem.g % 2 == 0 and problem.tensors["cu_seqlens"] is None


def _is_copied(t: Tensor | None) -> bool:
    """Whether the copy engine can take (b, l, heads or groups, channels) as one matrix of tokens."""
    if t is None or t.dtype != torch.bfloat16:
        return False
    one_matrix = t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1)
    dense = t.stride(3) == 1 and (t.shape[2] == 1 or t.stride(2) == t.shape[3])
    return one_matrix and dense and t.stride(1) % 8 == 0 and t.data_ptr() % 16 == 0


def _tokens(t: Tensor | None, width: int) -> TensorDescriptor:
    """``t`` (b, l, heads or groups, channels) for the copy engine, in tiles of a chunk's tokens."""
    assert t is not None
    shape = [t.shape[0] * t.shape[1], t.shape[2] * t.shape[3]]
    return TensorDescriptor(t, shape, [t.stride(1), 1], [_CHUNK, width], _swizzled())


@functools.cache
def _swizzled() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


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
    arguments = {
        "u_desc": _tokens(x, _CHANNELS),
        "key_desc": _tokens(B, _STATES),
        "query_desc": _tokens(C, _STATES),
        "out_desc": _tokens(y, _CHANNELS),
        "out": y,
        "D": D,
        "initial": wanted.initial,
        "step": decays["step"],
        "decay": decays["decay"],
        **ends,
        "final": wanted.final,
        "handed": problem.empty(2 * programs, _CHANNELS, _STATES),
        "flags": torch.zeros(2 * programs + 1, dtype=torch.int32, device=problem.device),
        "D_h": skip_strides(D)["D_h"],
        "length": problem.l,
        "heads": problem.h,
        "per_group": problem.h // problem.g,
        "slots": problem.slots,
        "total": problem.rows * segments * (problem.h // 2) * per_unit,
        "per_unit": per_unit,
        "SEGMENTS": segments,
        "STAGES": _STAGES,
        "Q": _CHUNK,
        "P": _CHANNELS,
        "N": _STATES,
    }
    launch(_gluon_kernels.scan, programs, arguments, {"num_warps": 4})
    return None, None


def _backward(problem: Problem, dy: Tensor, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
    """As `backward`, by the kernels."""
    x, initial = problem.tensors["x"], problem.tensors["initial"]
    assert x is not None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dinitial = None if initial is None else problem.new_states()
    dfinal = None if dfinal_state is None else dfinal_state.contiguous()
    with on(problem.device):
        decays = plain.make_decays(problem)
        arguments = {
            "x_desc": _tokens(x, _CHANNELS),
            "dy_desc": _tokens(dy, _CHANNELS),
            "cu_seqlens": problem.tensors["cu_seqlens"],
            "step": decays["step"],
            "decay": decays["decay"],
            "length": problem.l,
            "heads": problem.h,
            "per_group": problem.h // problem.g,
            "slots": problem.slots,
            "STAGES": _STAGES,
            "Q": _CHUNK,
            "P": _CHANNELS,
            "N": _STATES,
        }
        kept = _keep_states(problem, arguments, dfinal, dinitial)
        found = _chunks(problem, arguments, kept, dx)
        found = plain.finish_sums(problem, decays, found, _LINES)
    return dx, found["ddt"], found["dA"], found["dB"], found["dC"], found["dD"], None, found["dbias"], dinitial


def _keep_states(
    problem: Problem, arguments: dict[str, Any], dfinal: Tensor | None, dinitial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The states that enter the chunks and the gradients of those that leave them (2, slots, h, p, n), and what they
    are divided by (2, slots, h); ``dinitial`` is written."""
    given, shape = problem.tensors, (2, problem.slots, problem.h)
    states = problem.empty(*shape, problem.p, problem.n, dtype=torch.float16)
    scales = problem.empty(*shape)
    half = problem.rows * problem.g * -(-problem.h // problem.g // 2)
    rest = {
        "keys_desc": _tokens(given["B"], _STATES),
        "queries_desc": _tokens(given["C"], _STATES),
        "states_desc": _matrix(states, _STATES),
        "scales": scales,
        "initial": given["initial"],
        "dfinal": dfinal,
        "dinitial": dinitial,
        "half": half,
    }
    launch(_gluon_kernels.states, 2 * half, {**arguments, **rest}, {"num_warps": 4})
    return states, scales


def _chunks(
    problem: Problem, arguments: dict[str, Any], kept: tuple[Tensor, Tensor], dx: Tensor
) -> dict[str, Tensor | None]:
    """Shares in the gradients of B and C, and what `finish` puts together; ``dx`` is written."""
    given, D = problem.tensors, problem.tensors["D"]
    shares = _shares(problem.slots * problem.g, problem.h // problem.g, processors(problem.device))
    found = plain.sums_of_tokens(problem, _LINES) | problem.shared_gradients(shares)
    rest = {
        **found,
        "keys_desc": _tokens(given["B"], _STATES // 2),
        "queries_desc": _tokens(given["C"], _STATES // 2),
        "states_desc": _matrix(kept[0], _STATES // 2),
        "scales": kept[1],
        "dx_desc": _tokens(dx, _CHANNELS),
        "dx": dx,
        "D": D,
        "D_h": skip_strides(D)["D_h"],
        "groups": problem.g,
        "rows": problem.rows,
        "shares": shares,
        "tokens": problem.b * problem.l,
    }
    launch(_gluon_kernels.chunks, problem.slots * problem.g * shares, {**arguments, **rest}, {"num_warps": 4})
    return found


def _matrix(states: Tensor, width: int) -> TensorDescriptor:
    """Kept states (2, slots, h, p, n) for the copy engine, in tiles of ``width`` states."""
    rows = states.shape[0] * states.shape[1] * states.shape[2] * states.shape[3]
    return TensorDescriptor(states, [rows, _STATES], [_STATES, 1], [_CHANNELS, width], _swizzled())


@functools.lru_cache(256)
def _shares(chunks: int, heads: int, programs: int) -> int:
    """Programs that divide the heads of a group between them: as many as are done soonest."""

    def time(shares: int) -> int:
        return -(-chunks * shares // programs) * (-(-heads // shares) + _BESIDE)

    return min(range(1, heads + 1), key=time)
