"""The selective scan on any GPU that Triton knows, and in Triton's interpreter on a CPU."""

import triton
from torch import Tensor

from mambalm.ops.backends import Call
from mambalm.ops.selective_scan import _launch
from mambalm.ops.selective_scan._launch import Problem, checkpoint_shape
from mambalm.ops.selective_scan._triton_kernels import scan_backward, scan_forward
from mambalm.ops.selective_scan.arguments import Arguments

__all__ = ["backward", "checkpoint_shape", "forward", "supports"]

# States of a program, which is one warp.
_FORWARD_CELLS, _BACKWARD_CELLS = 1024, 512
# Steps loaded at once by the forward; divides the steps between checkpoints.
_AHEAD = 4
_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def supports(call: Call) -> str | None:
    """None, or why the call cannot run here."""
    return _launch.unsupported(call)


def _blocks(problem: Problem, cells: int) -> dict[str, int]:
    states = triton.next_power_of_2(problem.n)
    channels = triton.next_power_of_2(problem.d // problem.g)
    block = max(min(cells // states, channels), 1)
    return {"BLOCK": block, "STATES": states}


def forward(*arguments, save: bool) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """y, the final state and the checkpoints (empty unless ``save``); arguments as in the interface."""
    problem = Problem.of(Arguments(*arguments))
    ahead = 1 if problem.b * problem.l <= problem.rows else _AHEAD
    return _launch.launch_forward(
        scan_forward, problem, save, _OPTIONS, AHEAD=ahead, **_blocks(problem, _FORWARD_CELLS)
    )


def backward(dy: Tensor, dfinal_state: Tensor | None, *arguments) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state."""
    *inputs, checkpoints = arguments
    problem = Problem.of(Arguments(*inputs))
    blocks = _blocks(problem, _BACKWARD_CELLS)
    programs = problem.blocks(blocks["BLOCK"]) * problem.shares()
    scratch = problem.empty(programs, problem.piece, blocks["BLOCK"], blocks["STATES"])
    return _launch.launch_backward(
        scan_backward, problem, dy, dfinal_state, checkpoints, _OPTIONS, scratch=scratch, **blocks
    )
