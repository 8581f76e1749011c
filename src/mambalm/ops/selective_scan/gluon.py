"""The selective scan on NVIDIA GPUs, in Gluon: plain Triton's recurrence with its tiles staged in shared memory."""

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from mambalm.ops import gluon_support
from mambalm.ops.backends import Call
from mambalm.ops.selective_scan import _launch
from mambalm.ops.selective_scan import triton as plain
from mambalm.ops.selective_scan._gluon_kernels import scan_backward, scan_ends, scan_forward
from mambalm.ops.selective_scan._launch import Problem, checkpoint_shape
from mambalm.ops.selective_scan.arguments import Arguments
from mambalm.ops.triton_support import dense_channels, launch, on, processors

__all__ = ["backward", "checkpoint_shape", "forward", "supports"]

# Rows no longer than this on average, decoding among them, are not worth a tile in shared memory.
_SHORT = 4
_MOST_CHUNKS = 16


def supports(call: Call) -> str | None:
    """None, or why the call cannot run here."""
    reason = gluon_support.unsupported(call.device, lambda capability: capability >= (8, 0), "8.0 or later")
    return reason or _launch.unsupported(call)


@dataclass(frozen=True)
class Plan:
    """How a kernel cuts the work; chosen by rule, not by trial, so that a first call does not stall."""

    lanes: int  # threads of a channel with 16 states; as many more as there are more states
    several: int  # channels of a thread
    warps: int
    tile: int = 16  # steps staged at once
    chunks: int = 1  # pieces of a row that are scanned side by side
    registers: int | None = None

    def meta(self, states: int) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        states = max(triton.next_power_of_2(states), 4)
        lanes = min(max(states * self.lanes // 16, 2), 32)
        several = self.several if states // lanes <= 4 else 1  # else the states spill out of the registers
        sizes = {"LANES": lanes, "SEVERAL": several, "BLOCK": 32 // lanes * self.warps * several}
        return {"STATES": states, "CHUNKS": self.chunks, **sizes}

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "enable_fp_fusion": True, **limit}


def _channels_per_processor(problem: Problem) -> float:
    return problem.rows * problem.d / processors(problem.device)


def _chunks(problem: Problem, shortest: int) -> int:
    """A power of two that brings 600 channels to a multiprocessor, by chunks of at least ``shortest`` steps."""
    most = min(problem.b * problem.l // max(problem.rows, 1) // shortest, _MOST_CHUNKS)
    chunks = 1
    while _channels_per_processor(problem) * chunks < 600 and 2 * chunks <= most:
        chunks *= 2
    return chunks


# The thresholds were measured on an H200, see docs/decisions/selective-scan-gpu.md.
def _forward_plan(problem: Problem) -> Plan:
    """Two passes over the chunks double the exponentials, so that they pay on few channels only."""
    channels = _channels_per_processor(problem)
    chunks = 1 if channels > 50 else _chunks(problem, shortest=128)
    if channels * chunks >= 150:
        return Plan(lanes=4, several=2, warps=4, chunks=chunks)
    if channels * chunks >= 50:
        return Plan(lanes=8, several=2, warps=4, tile=32, chunks=chunks)
    return Plan(lanes=8, several=1, warps=4, tile=32, chunks=chunks)


def _backward_plan(problem: Problem) -> Plan:
    """The first pass over the chunks is a small part of a backward."""
    channels = _channels_per_processor(problem)
    chunks = 1 if channels > 80 else _chunks(problem, shortest=256)
    if channels * chunks >= 150:
        return Plan(lanes=4, several=2, warps=2, chunks=chunks)
    return Plan(lanes=8, several=2, warps=2, chunks=chunks, registers=168)


def _chunk_ends(problem: Problem, plan: Plan, dy: Tensor | None) -> dict[str, Any]:
    """What the chunks do to a state (with dy: to its gradient), for the kernels to start each chunk from."""
    if plan.chunks == 1:
        return {"ends": None, "totals": None}
    items = problem.rows * plan.chunks
    found = {"ends": problem.empty(items, problem.d, problem.n), "totals": problem.empty(items, problem.d)}
    meta = plan.meta(problem.n)
    strides = _launch.stride_arguments("dy", dy)
    with on(problem.device):
        arguments = {**problem.arguments(), "dy": dy, **found, **strides, **meta}
        launch(scan_ends, problem.blocks(meta["BLOCK"]) * items, arguments, plan.options)
    return found


def forward(*arguments, save: bool) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """y, the final state and the checkpoints (empty unless ``save``); arguments as in the interface."""
    problem = Problem.of(Arguments(*arguments))
    if problem.b * problem.l <= _SHORT * problem.rows:
        return plain.forward(*arguments, save=save)
    plan = _forward_plan(problem)
    ends = _chunk_ends(problem, plan, None)
    meta = plan.meta(problem.n)
    return _launch.launch_forward(
        scan_forward, problem, save, plan.options, chunks=plan.chunks, TILE=plan.tile, **ends, **meta
    )


def backward(dy: Tensor, dfinal_state: Tensor | None, *arguments) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state."""
    *inputs, checkpoints = arguments
    problem = Problem.of(Arguments(*inputs))
    plan = _backward_plan(problem)
    dy = dense_channels(dy)
    ends = _chunk_ends(problem, plan, dy)
    meta = plan.meta(problem.n)
    return _launch.launch_backward(
        scan_backward, problem, dy, dfinal_state, checkpoints, plan.options, chunks=plan.chunks, **ends, **meta
    )
