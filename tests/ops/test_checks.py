"""What no op takes is refused by the name of the argument, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import CPU_CASES, Case
from mambalm.ops import linear_cross_entropy

WRONG = [
    ([1.0], "must be a tensor, got list"),
    (0.5, "must be a tensor, got float"),
    (torch.zeros(3, dtype=torch.int64), "must be real floating point of 16 to 64 bits, got torch.int64"),
    (torch.zeros(3, dtype=torch.complex64), "must be real floating point of 16 to 64 bits, got torch.complex64"),
    (torch.zeros(3).to(torch.float8_e4m3fn), "must be real floating point of 16 to 64 bits, got torch.float8_e4m3fn"),
    (torch.zeros(3).to_sparse(), "must be dense, got the layout torch.sparse_coo"),
]
REQUIRED = {"u", "x", "delta", "dt", "A", "B", "C"}


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.op)
@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda value: str(value) if isinstance(value, str) else "")
@pytest.mark.parametrize("backend", ["portable", "reference", None])
def test_what_is_no_dense_floating_point(case: Case, wrong: Any, message: str, backend: str | None) -> None:
    case = case.shrunk()
    arguments = case.arguments(torch.device("cpu"), torch.float32)
    for name in arguments:
        with pytest.raises(TypeError, match=f"{case.op}: {name} {message}"):
            case.call(arguments | {name: wrong}, backend)


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.op)
def test_what_is_required(case: Case) -> None:
    case = case.shrunk()
    arguments: dict[str, Any] = {**case.arguments(torch.device("cpu"), torch.float32)}
    for name in REQUIRED & arguments.keys():
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"):
            case.call(arguments | {name: None})


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda value: str(value) if isinstance(value, str) else "")
def test_of_the_loss(wrong: Any, message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "bias": torch.zeros(5)}
    for name in arguments:
        with pytest.raises(TypeError, match=f"{name} {message}"):
            linear_cross_entropy(**(arguments | {name: wrong}), labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="labels must be an int64 tensor"):
        linear_cross_entropy(**arguments, labels=[0, 1])  # type: ignore[arg-type]
