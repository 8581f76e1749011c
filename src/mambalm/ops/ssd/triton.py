"""ssd on any GPU that Triton knows, and in Triton's interpreter on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambalm.ops.backends import Call
from mambalm.ops.ssd import _launch
from mambalm.ops.ssd._launch import Problem, checkpoint_shape, skip_strides, stride_arguments
from mambalm.ops.ssd._triton_kernels import advance, finish, pairs, prepare, scan
from mambalm.ops.ssd.arguments import Arguments
from mambalm.ops.triton_sums import sums
from mambalm.ops.triton_support import ceil_div, dense_channels, launch, multiplies_from_shared, on, power_of_2

__all__ = ["backward", "checkpoint_shape", "forward", "supports"]

Decays = dict[str, Tensor | None]
States = tuple[Tensor | None, Tensor | None]  # of every chunk (slots, blocks, n, p), and scales (slots, blocks, 2)
Scan = Callable[[Problem, Decays, "Pass"], States]

# Heads of a program that makes or sums decays; cells of a state of a program that makes one step.
_HEADS, _STEP_CELLS = 16, 2048
# Chunks (or what a loop takes) in flight at most, and warps: of a scan, of one that makes no outputs, pairs.
_SCAN, _STATES, _PAIRS = (2, 4), (3, 4), (3, 8)
_CELLS = 8192  # of a state that 4 warps of a scan hold
_SOME = 64  # states of a program of pairs


def supports(call: Call) -> str | None:
    """None, or why the call cannot run here."""
    return _launch.unsupported(call)


def forward(*arguments, final: bool, save: bool) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """y, the final state (empty unless asked for) and an empty tensor; arguments as in the interface."""
    return run_forward(Problem.of(Arguments(*arguments)), final, scan_rows)


def backward(dy: Tensor, dfinal_state: Tensor | None, *arguments) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """The gradients of x, dt, A, B, C, D, z, dt_bias and initial_state."""
    *inputs, _ = arguments
    return run_backward(Problem.of(Arguments(*inputs)), dy, dfinal_state, scan_rows)


@dataclass(frozen=True)
class Pass:
    """What a scan over all rows is to make: forwards y, or dz where dy is given, backwards in time dx from dy."""

    out: Tensor | None
    reverse: bool = False
    dy: Tensor | None = None
    initial: Tensor | None = None
    final: Tensor | None = None
    keep: bool = False  # the states that enter the chunks


class Lines(NamedTuple):
    """How many lines of a value for each token a block has: of what crosses tokens, of all else; and how many sums of
    what passes through a chunk a line has."""

    crossings: int
    others: int
    some: int


def run_forward(problem: Problem, final: bool, scan_with: Scan) -> tuple[Tensor, ...]:
    """As `forward`, with a given implementation of the scan."""
    y = problem.empty(problem.b, problem.l, problem.h, problem.p, dtype=problem.dtype)
    state = problem.new_states() if final else None
    with on(problem.device):
        if problem.l == 1 and problem.tensors["cu_seqlens"] is None:
            _advance(problem, y, state)
        else:
            scan_with(problem, make_decays(problem), Pass(y, initial=problem.tensors["initial"], final=state))
    return y, problem.empty(0) if state is None else state, problem.empty(0)


def run_backward(
    problem: Problem, dy: Tensor, dfinal_state: Tensor | None, scan_with: Scan
) -> tuple[Tensor | None, ...]:
    """As `backward`, with a given implementation of the scan."""
    dy = dense_channels(dy)
    dx, dz = (
        None if (t := problem.tensors[name]) is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for name in "xz"
    )
    initial = problem.tensors["initial"]
    dinitial = None if initial is None else problem.new_states()
    dfinal = None if dfinal_state is None else dfinal_state.contiguous()
    with on(problem.device):
        decays = make_decays(problem)
        entering = scan_with(problem, decays, Pass(dz, dy=None if dz is None else dy, initial=initial, keep=True))
        back = Pass(dx, reverse=True, dy=dy, initial=dfinal, final=dinitial, keep=True)
        leaving = scan_with(problem, decays, back)
        chunks = _chunks(problem, decays, dy, entering, leaving)
        found, dD, lines = _pairs(problem, chunks)
        found = finish_sums(problem, decays, found, lines)
    dD = found["dD"] if dD is None else dD
    return dx, found["ddt"], found["dA"], found["dB"], found["dC"], dD, dz, found["dbias"], dinitial


def make_decays(problem: Problem) -> Decays:
    """Δ and the running sums of log decays of each chunk."""
    shape = (problem.h, problem.slots, problem.chunk)
    found = {name: problem.empty(*shape) for name in ("step", "decay")}
    decays = {**found, "whole": problem.empty(*shape) if problem.exact else None}
    _launch_steps(prepare, problem, decays)
    return decays


def _launch_steps(kernel: Any, problem: Problem, rest: dict[str, Any]) -> None:
    """Launch a kernel over steps, some heads of a chunk a program."""
    given = {name: problem.tensors[name] for name in ("dt", "A", "bias", "cu_seqlens")}
    sizes = {"length": problem.l, "heads": problem.h, "rows": problem.rows, "slots": problem.slots}
    strides = stride_arguments("dt", problem.tensors["dt"], "blh")
    tiles = {"Q": problem.chunk, "HEADS": _HEADS}
    if programs := problem.slots * ceil_div(problem.h, _HEADS):
        launch(kernel, programs, {**given, **strides, **problem.limits, **sizes, **tiles, **rest}, {"num_warps": 2})


def scan_rows(problem: Problem, decays: Decays, wanted: Pass) -> States:
    """A scan in plain Triton; returns the states that enter the chunks, if they are wanted."""
    segments = problem.segments()
    states, scales = problem.kept_states() if wanted.keep else (None, None)
    ends = segment_ends(problem, decays, wanted, segments)
    targets = {"out": wanted.out, "states": states, "scales": scales, "initial": wanted.initial, "final": wanted.final}
    _launch_scan(problem, decays, wanted, segments, **targets, **ends, SUMMARY=False)
    return states, scales


def segment_ends(problem: Problem, decays: Decays, wanted: Pass, segments: int) -> dict[str, Tensor | None]:
    """What each of a row's segments does to a state, for all of them to be scanned side by side."""
    if segments == 1:
        return {"ends": None, "totals": None}
    ends = problem.empty(problem.rows * segments, problem.h, problem.p, problem.n)
    found: dict[str, Tensor | None] = {"ends": ends, "totals": problem.empty(problem.rows * segments, problem.h)}
    nothing = {"out": None, "states": None, "scales": None, "initial": None, "final": None}
    _launch_scan(problem, decays, wanted, segments, **nothing, **found, SUMMARY=True)
    return found


def roles(problem: Problem, wanted: Pass) -> dict[str, Tensor | None]:
    """The tensors of a scan by what they are in it."""
    given = problem.tensors
    if wanted.reverse:
        return {"u": wanted.dy, "key": given["C"], "query": given["B"], "z": given["z"], "dy": None}
    return {"u": given["x"], "key": given["B"], "query": given["C"], "z": given["z"], "dy": wanted.dy}


def _launch_scan(problem: Problem, decays: Decays, wanted: Pass, segments: int, **rest: Any) -> None:
    tensors, D = roles(problem, wanted), problem.tensors["D"]
    strides = {k: v for name, t in tensors.items() for k, v in stride_arguments(name, t, _axes(name)).items()}
    (most, warps), matrices = (_STATES, 1) if wanted.out is None or rest["SUMMARY"] else (_SCAN, 2)
    tiles = problem.tiles
    q, p, n = (tiles[name] for name in "QPN")
    if matrices == 2 and not multiplies_from_shared(problem.device):
        most, warps = 1, 8
    elif n * p > _CELLS:
        warps *= 2
    arguments = {**tensors, **strides, **skip_strides(D), **decays, **problem.sizes(), **tiles, **rest}
    arguments |= {"D": D, "cu_seqlens": problem.tensors["cu_seqlens"], "SEGMENTS": segments}
    arguments |= {"REVERSE": wanted.reverse, "CAREFUL": wanted.keep}
    arguments["STAGES"] = problem.stages(q * (p + matrices * n), q * q + n * p, most)
    if programs := problem.blocks * problem.rows * segments:
        launch(scan, programs, arguments, {"num_warps": warps})


def _axes(name: str) -> str:
    return "blg" if name in ("key", "query", "B", "C") else "blh"


def _chunks(problem: Problem, decays: Decays, dy: Tensor, entering: States, leaving: States) -> dict[str, Any]:
    """What the kernels over chunks take first."""
    given = problem.tensors
    tensors = {"x": given["x"], "dy": dy, "z": given["z"], "B": given["B"], "C": given["C"]}
    strides = {k: v for name, t in tensors.items() for k, v in stride_arguments(name, t, _axes(name)).items()}
    states = {"states": entering[0], "scales": entering[1], "dstates": leaving[0], "dscales": leaving[1]}
    rows = {"cu_seqlens": given["cu_seqlens"], "rows": problem.rows}
    return {**tensors, **strides, **decays, **states, **rows, **problem.sizes(), **problem.tiles}


def _pairs(problem: Problem, chunks: dict[str, Any]) -> tuple[Decays, Tensor | None, Lines]:
    """Shares in the gradients of B and C and what `finish` puts together, and the gradient of D (h, p)."""
    (most, warps), D = _PAIRS, problem.tensors["D"]
    q, p, n = (problem.tiles[name] for name in "QPN")
    some = min(_SOME, n)
    parts = n // some
    shares = problem.shares(parts)
    dD = problem.empty(problem.slots, problem.blocks, p) if D is not None and D.ndim == 2 else None
    lines = Lines(parts, parts, some)
    found = sums_of_tokens(problem, lines) | problem.shared_gradients(shares)
    rest = {"groups": problem.g, "shares": shares, "tokens": problem.b * problem.l, "SOME": some}
    rest["STAGES"] = 1 if problem.short else problem.stages(2 * (q + some) * p, 2 * q * some + q * q, most)
    if programs := problem.slots * problem.g * shares * parts:
        launch(pairs, programs, {**chunks, **found, **rest, "dD": dD}, {"num_warps": warps})
    if dD is not None:
        dD = dD.sum(0).view(problem.h, -1)[:, : problem.p]
    return found, dD, lines


def sums_of_tokens(problem: Problem, lines: Lines) -> Decays:
    """Room for what `finish` puts together."""
    D, tokens = problem.tensors["D"], problem.blocks * problem.slots * problem.chunk
    sizes = {"crossing": lines.crossings * tokens, "writes": lines.others * tokens, "direct": lines.others * tokens}
    if problem.exact:
        sizes["within"] = lines.others * tokens
    if D is not None and D.ndim == 1:
        sizes["skips"] = lines.others * tokens
    sizes["passed"] = lines.others * problem.blocks * problem.slots * lines.some
    room = problem.empty(sum(sizes.values())).split(list(sizes.values()))  # quicker than many
    return {"within": None, "skips": None, **dict(zip(sizes, room, strict=True))}


def finish_sums(problem: Problem, decays: Decays, found: Decays, lines: Lines) -> Decays:
    """The gradients of dt, A, dt_bias and D (h), and those of B and C from their shares; None is one that is not there,
    or not here."""
    dt, dB, dC = problem.tensors["dt"], found["dB"], found["dC"]
    assert dt is not None
    assert dB is not None
    assert dC is not None
    there = {"dA": True, "dbias": problem.tensors["bias"] is not None, "dD": found["skips"] is not None}
    names = [name for name, wanted in there.items() if wanted]
    of_heads = problem.empty(len(names), problem.slots, problem.h)
    shares: Decays = dict.fromkeys(there)
    shares |= zip(names, of_heads.unbind(), strict=True)
    ddt = problem.empty(*dt.shape, dtype=dt.dtype)
    each = problem.blocks // problem.h
    rest = {"blocks": each * lines.others, "crossings": each * lines.crossings, "SOME": lines.some}
    _launch_steps(finish, problem, {**found, **shares, **rest, "ddt": ddt, "step": decays["step"]})
    if dB.shape[0] == 1:  # then chunks are many, of which torch sums few heads sooner
        totals = zip(names, of_heads.sum(1).unbind(), strict=True)
        return {**dict.fromkeys(there), **dict(totals), "ddt": ddt, "dB": dB[0], "dC": dC[0]}
    shares |= {"dB": dB, "dC": dC}
    dtypes = [torch.float32] * 3 + [problem.dtype] * 2
    return {"ddt": ddt, **dict(zip(shares, sums(list(shares.values()), dtypes), strict=True))}


def _advance(problem: Problem, y: Tensor, state: Tensor | None) -> None:
    """One step of every row, in one launch."""
    given = {name: problem.tensors[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "bias", "initial")}
    states = power_of_2(problem.n)
    block = max(min(_STEP_CELLS // states, power_of_2(problem.p)), 1)
    strides: dict[str, int] = {}
    for name, axes in {"x": "bh", "dt": "bh", "z": "bh", "B": "bg", "C": "bg"}.items():
        t = given[name]
        strides |= stride_arguments(name, None if t is None else t[:, 0], axes)
    sizes = {"heads": problem.h, "per_group": problem.h // problem.g, "channels": problem.p, "state_size": problem.n}
    arguments = {**given, **strides, **skip_strides(given["D"]), **problem.limits, **sizes, "y": y, "final": state}
    if programs := problem.b * problem.h * ceil_div(problem.p, block):
        launch(advance, programs, {**arguments, "P": block, "N": states}, {"num_warps": 4})
