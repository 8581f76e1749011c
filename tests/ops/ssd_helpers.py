"""What the tests of ssd share: arguments, and the op called whole, packed and piece by piece."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambalm.ops.ssd import ssd
from tests.helpers import cu_seqlens, pieces, relative_error

TOKENS = ("x", "dt", "B", "C", "z")


def arguments(
    b: int,
    l: int,
    h: int = 4,
    p: int = 3,
    n: int = 5,
    g: int = 1,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Every tensor argument; activations in ``dtype``, parameters and state in float32 or float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(to)

    return {
        "x": draw(b, l, h, p),
        "dt": draw(b, l, h),
        "A": -torch.rand(h, dtype=torch.float64).to(wide) * 4,
        "B": draw(b, l, g, n),
        "C": draw(b, l, g, n),
        "D": draw(h, to=wide),
        "z": draw(b, l, h, p),
        "dt_bias": draw(h, to=wide),
        "initial_state": draw(b if rows is None else rows, h, p, n, to=wide),
    }


def scan(backend: str | None, offsets: list[int] | None = None, *, device: str = "cpu", **options: Any) -> Any:
    packed = None if offsets is None else cu_seqlens(offsets, device)
    options = {"dt_softplus": True, "chunk_size": 16} | options

    def run(**kwargs: Tensor) -> tuple[Tensor, Tensor]:
        result = ssd(**kwargs, cu_seqlens=packed, return_final_state=True, backend=backend, **options)
        assert isinstance(result, tuple)
        return result

    return run


def output_weights(args: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.randn_like(args["x"].double()), torch.randn_like(args["initial_state"].double())


def doubled(args: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in args.items()}


def piecewise(offsets: list[int], backend: str, *, chained: bool) -> Any:
    """Each piece by a call of its own; chained: the state handed on, else every piece with its row of states."""

    def run(initial_state: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
        ys, states = [], [initial_state]
        for row, piece in enumerate(pieces(offsets)):
            start = states[-1] if chained else initial_state[row : row + 1]
            part = {name: t[:, piece] if name in TOKENS else t for name, t in kwargs.items()}
            y, state = scan(backend)(**part, initial_state=start)
            ys.append(y)
            states.append(state)
        return torch.cat(ys, dim=1), states[-1] if chained else torch.cat(states[1:])

    return run


def without_states(args: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor]]:
    """The arguments but the initial state, and a weight for y."""
    few = {name: t for name, t in args.items() if name != "initial_state"}
    return few, (torch.randn_like(args["x"].double()),)


def only_y(backend: str, offsets: list[int], **options: Any) -> Any:
    packed = cu_seqlens(offsets)
    return lambda **kwargs: ssd(
        **kwargs, dt_softplus=True, cu_seqlens=packed, backend=backend, **{"chunk_size": 16} | options
    )


def rounded_states(rounded: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The yardstick of kernels whose matrix products take operands of ``dtype``: what the reference makes in that
    dtype; of what it makes in float32 (states, gradients of states and parameters) the worse of that and the exact
    result rounded to ``dtype`` once. The gradients of A and the bias are never rounded to ``dtype`` on the way, the
    states that they come from are, to 11 bits."""

    def worse(name: str, t: Tensor) -> Tensor:
        truth = exact[name]
        once = truth * (1 + 2**-12) if name in ("dA", "ddt_bias") else truth.to(dtype)
        return once if relative_error(once, truth) > relative_error(t, truth) else t

    return {name: t if t.dtype == dtype else worse(name, t) for name, t in rounded.items()}
