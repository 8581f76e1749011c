"""The CPU's matrix products: every way against float64, with gradients; which way is taken, and when none is."""

from __future__ import annotations

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.diagnostics.verify import relative_error

module = importlib.import_module("mambalm.ops.linear")
linear = module.linear

WAYS = [(torch.float32, "oneDNN"), (torch.float32, "BLAS"), (torch.bfloat16, "bfloat16"), (torch.bfloat16, "float32")]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    dtype, name = request.param
    if name not in module._ways(dtype):
        pytest.skip(f"this torch has no {name}")
    monkeypatch.setattr(module, "chosen", lambda asked: name if asked == dtype else next(iter(module._ways(asked))))
    return dtype


def inputs(dtype: torch.dtype, rows: tuple[int, ...], k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*rows, k + 3).to(dtype)[..., 1 : k + 1]  # of rows that are not dense
    return x, torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)


@pytest.mark.parametrize(("rows", "k", "n"), [((1,), 5, 1), ((2, 3), 7, 13), ((1, 61), 48, 96)])
@pytest.mark.parametrize("biased", [True, False])
def test_against_float64(dtype: torch.dtype, rows: tuple[int, ...], k: int, n: int, biased: bool) -> None:
    x, weight, bias = inputs(dtype, rows, k, n)
    given = bias if biased else None
    exact = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    found = linear(x, weight, given)
    assert found.dtype == dtype
    assert found.shape == (*rows, n)
    allowed = 1e-5 if dtype == torch.float32 else 2 * relative_error(exact.to(dtype), exact)
    assert relative_error(found, exact) <= allowed


@pytest.mark.parametrize("biased", [True, False])
def test_gradients_and_theirs(dtype: torch.dtype, biased: bool) -> None:
    leaves = [t.detach().requires_grad_() for t in inputs(dtype, (2, 9), 7, 5)[: 3 if biased else 2]]
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    dy, direction = torch.randn(2, 9, 5).to(dtype), torch.randn(2, 9, 7).to(dtype)
    found, exact = [], []
    for function, given, out in ((linear, leaves, found), (F.linear, exact_leaves, exact)):
        y = function(*given)
        gradients = torch.autograd.grad(y, given, dy.to(y.dtype), create_graph=True)
        second = torch.autograd.grad((gradients[0] * direction.to(y.dtype)).sum(), given[1])
        out += [*gradients, *second]
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        assert relative_error(one, other) <= tolerance


def test_the_second_way_is_taken_when_it_is_far_ahead_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for times, expected in (((1.0, 0.9), "bfloat16"), ((1.0, 0.5), "float32"), ((0.5, 1.0), "bfloat16")):
        both = dict(zip(("bfloat16", "float32"), times, strict=True))
        monkeypatch.setattr(module, "measured", lambda dtype, both=both: both)
        assert module.chosen.__wrapped__(torch.bfloat16) == expected


def test_each_way_is_measured_once() -> None:
    times = module.measured(torch.bfloat16)
    assert set(times) == {"bfloat16", "float32"}
    assert all(ms > 0 for ms in times.values())
    assert module.measured(torch.bfloat16) is times
    assert module.chosen(torch.float64) == ""


def test_two_callers_that_measure_at_once_leave_the_threads(two_threads: None) -> None:
    together = threading.Barrier(2)

    def first_product() -> None:
        together.wait()
        module.measured.__wrapped__(torch.float32)

    def threads_of_the_next_one() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(first_product) for _ in range(2)]:
                future.result()
        assert threads_of_the_next_one() == torch.get_num_threads() == 2


def test_what_is_torch_s_stays_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a way of ours was taken")

    monkeypatch.setattr(module, "_run", refuse)
    monkeypatch.setattr(module, "_differentiable", refuse)
    x, weight, bias = inputs(torch.float32, (2,), 4, 3)
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert linear(x[:0], weight, bias).shape == (0, 3)
    assert linear(x.to("meta"), weight.to("meta")).device.type == "meta"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x, weight, bias), F.linear(x, weight, bias)) <= 1e-6
    torch.func.vmap(lambda row: linear(row, weight, bias))(x)
    with pytest.raises(AssertionError, match="ours"):
        linear(x, weight)
