"""Which backend runs, and that the ways in which an op's computation is called give the same, each where it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.__main__ import gradients
from benchmarks.cases import CPU_CASES, Case
from mambalm.ops import BackendError, backends, selective_scan
from mambalm.ops.backends import Call, Function, choose, use


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.op)
def test_the_registered_op_gives_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case.shrunk()
    arguments = case.arguments(torch.device("cpu"), torch.float32)
    direct = gradients(case, arguments, "portable")
    monkeypatch.setattr(backends, "is_plain", lambda *_: False)
    registered = gradients(case, arguments, "portable")
    assert direct.keys() == registered.keys()
    assert all(torch.equal(direct[name], registered[name]) for name in direct)


class TestChoice:
    """Argument > context manager > automatic; what was asked for runs or raises."""

    def test_asked_for_and_missing_raises(self) -> None:
        with pytest.raises(BackendError, match="'gluon' backend was asked for but cannot run"):
            scan(torch.ones(1, 5, 4), "gluon")
        with use("gluon"), pytest.raises(BackendError, match="'gluon' backend was asked for"):
            scan(torch.ones(1, 5, 4))

    def test_argument_beats_context(self) -> None:
        with use("gluon"):
            scan(torch.ones(1, 5, 4), "portable")
        scan(torch.ones(1, 5, 4))

    def test_unknown_name(self) -> None:
        with pytest.raises(BackendError, match="unknown backend 'fast'"):
            scan(torch.ones(1, 5, 4), "fast")

    def test_a_plain_device_runs_portable(self) -> None:
        call = Call("selective_scan", torch.device("mps"), torch.float32, {"d": 4, "n": 4})
        assert choose(call, "").__name__.endswith("selective_scan.portable")

    @pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
    def test_a_library_that_does_not_load_is_a_reason(
        self, error: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(_: str) -> None:
            raise error("libsomething.so: cannot open shared object file")

        monkeypatch.setattr(backends.importlib, "import_module", broken)
        reason = backends._load.__wrapped__("selective_scan", "cpu")
        assert reason == "its import failed (libsomething.so: cannot open shared object file)"


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.op)
@pytest.mark.parametrize("backend", ["portable", None])
def test_what_the_compiler_is_told_of_strided_inputs(
    case: Case, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the op and of its gradient."""
    case = case.shrunk()
    given = case.arguments(torch.device("cpu"), torch.float32)
    strided = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in given.items()}
    assert not all(t.is_contiguous() for t in strided.values())
    called = []

    def recorded(run: Function, op: Function, *rest: Any) -> Function:
        return lambda *arguments: called.append((op, arguments)) or op(*arguments)

    monkeypatch.setattr(backends, "way", recorded)
    y = case.call({name: t.requires_grad_() for name, t in strided.items()}, backend)
    torch.autograd.grad(y, strided.values(), torch.randn(y.shape[::-1]).permute(*range(y.ndim)[::-1]))
    assert [str(op._opoverload) for op, _ in called] == [f"mambalm.{case.op}{end}.default" for end in ("", "_backward")]
    for op, arguments in called:
        detached = tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)
        torch.library.opcheck(op, detached, test_utils=("test_schema", "test_faketensor"))


def test_each_way_is_taken() -> None:
    def way(*tensors: Tensor | None) -> str:
        gradients = backends.Differentiable(lambda: "with gradient", lambda: "transformed")
        return backends.way(lambda: "run", lambda: "op", tensors, gradients)()

    plain, wanted = torch.ones(2), torch.ones(2, requires_grad=True)
    assert way(plain, None) == way(torch.nn.Parameter(plain, requires_grad=False)) == "run"
    assert way(plain, wanted) == "with gradient"
    assert way(plain, torch.ones(2, device="meta")) == "op"
    assert backends.way(way, print, (wanted,)) is print
    with torch.no_grad():
        assert way(wanted) == "run"
    ways: list[str] = []
    torch.func.vmap(lambda t: (ways.append(way(t)), t)[1])(plain)
    torch.compile(lambda t: (ways.append(way(t)), t)[1], backend="eager")(plain)
    assert ways == ["transformed", "op"]


def scan(u: Tensor, backend: str | None = None) -> Tensor:
    B = torch.linspace(-1, 1, 15).view(1, 5, 3)
    y = selective_scan(u, u.abs(), -torch.ones(4, 3), B, B, backend=backend)
    assert isinstance(y, Tensor)
    return y


def test_a_second_derivative_is_refused() -> None:
    u = torch.randn(1, 5, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(scan(u).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan has no second derivative"):
        gradient.sum().backward()
