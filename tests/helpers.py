"""What the tests share: errors against float64, packings, hypothesis strategies for splits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambalm.diagnostics.verify import FLOAT32_TOLERANCE as FLOAT32
from mambalm.diagnostics.verify import HALF_PRECISION_FACTOR, relative_error

if TYPE_CHECKING:
    from hypothesis import strategies

__all__ = [
    "FLOAT32",
    "assert_close",
    "assert_no_worse",
    "cu_seqlens",
    "gradients",
    "pieces",
    "relative_error",
    "splits",
]


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = FLOAT32) -> None:
    """Each named tensor within ``tolerance`` of the expected one; all failures are listed."""
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    bad = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not bad, f"relative errors over {tolerance}: {bad}; all: {errors}"


def assert_no_worse(actual: Mapping[str, Tensor], rounded: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """The half-precision rule: an error against float64 is at most twice that of the reference run in that dtype.

    Tensors that the reference gets within float32 rounding are held to the float32 tolerance.
    """
    for name, truth in exact.items():
        allowed = max(HALF_PRECISION_FACTOR * relative_error(rounded[name], truth), FLOAT32)
        error = relative_error(actual[name], truth)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Mapping[str, Tensor],
    weights: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Outputs ("out0", ...) and gradients ("d<name>") of the sum of the outputs times ``weights``.

    A differentiable function of the tensors in ``arguments``; the caller's tensors are left alone.
    """
    leaves = {name: t.detach().clone().requires_grad_() for name, t in arguments.items()}
    outputs = function(**leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    total = sum((out * w.to(out)).sum() for out, w in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    return results | {f"d{name}": g for name, g in zip(leaves, found, strict=True)}


def splits(length: int) -> strategies.SearchStrategy[list[int]]:
    """Offsets [0, ..., length] of a split into consecutive pieces; pieces may be empty."""
    # Tests that need a GPU use this module too, and run where hypothesis may be missing.
    from hypothesis import strategies as st

    inner = st.lists(st.integers(0, length), max_size=6).map(sorted)
    return inner.map(lambda cuts: [0, *cuts, length])


def pieces(offsets: Sequence[int]) -> list[slice]:
    """The slices between consecutive offsets."""
    return [slice(i, j) for i, j in itertools.pairwise(offsets)]


def cu_seqlens(offsets: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Packed offsets as the ops take them."""
    return torch.tensor(offsets, dtype=torch.int32, device=device)
