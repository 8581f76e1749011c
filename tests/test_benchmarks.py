"""The benchmark's registry runs, and its gate refuses a backend that is wrong."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.__main__ import run, wrong_tensors
from benchmarks.cases import CPU_CASES, GPU_CASES, Case
from benchmarks.peers import beside, draw
from benchmarks.ranks import _visible
from benchmarks.timing import device_ms
from mambalm.ops.backends import OPS

CPU = torch.device("cpu")


def test_every_op_has_a_case_on_every_device() -> None:
    assert {case.op for case in CPU_CASES} == {case.op for case in GPU_CASES} == set(OPS)


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.op)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_portable_backend_passes_the_gate(case: Case, dtype: torch.dtype) -> None:
    assert not wrong_tensors(case.shrunk(), CPU, dtype, "portable")


def test_a_wrong_backend_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("rms_norm", {"b": 1, "l": 5, "d": 8})
    assert "forward_ms" in run(case, CPU, torch.float32)
    call = Case.call

    def wrong(self: Case, arguments: dict[str, Tensor], backend: str | None = None) -> Tensor:
        return call(self, arguments, backend) * (1.0 if backend == "reference" else 1.01)

    monkeypatch.setattr(Case, "call", wrong)
    row = run(case, CPU, torch.float32)
    assert "forward_ms" not in row
    assert set(row["wrong"]) == {"output", "x", "weight"}


def test_time_against_length_is_drawn_from_results(tmp_path: Path) -> None:
    shape = {"b": 1, "l": 64, "d": 8}
    peerless = beside(shape | {"forward_ms": 2.0}, (1.0, 1.0), (1.5, None), (None, None))
    assert peerless["forward"] == {"floor_ms": 1.0, "times_floor": 2.0, "goal_ms": 1.5}
    row = beside(shape | {"forward_ms": 2.0, "backward_ms": 3.0}, (1.0, 1.0), (1.5, None), (4.0, 9.0))
    assert row["backward"]["faster_than_mamba_ssm"] == 3.0
    results = {"device": "one", "rows": [row, peerless], "lengths": [{"l": 32, "forward_ms": 1.0, "backward_ms": 2.0}]}
    draw(results, tmp_path / "time.png", "a scan", lambda row: row["d"] == 8)
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")


class Stream:
    """A device that works behind a host, in milliseconds: stands for torch.cuda where there is none."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.device, self.host) + device

    def wait(self) -> None:
        self.host = max(self.host, self.device)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.device, self.host))
        event.query = lambda: event.at <= self.host
        event.synchronize = self.wait
        event.elapsed_time = lambda end: end.at - event.at
        return event


@pytest.mark.parametrize("host", [0.01, 0.6, 20.0])
@pytest.mark.parametrize("waits", [False, True])
def test_device_time_has_no_host_time_in_it(host: float, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, empty = Stream(), torch.empty
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: stream.launch(0.0, cycles / 2e6))
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(0, dtype=dtype))

    def backward() -> None:
        for _ in range(5):
            stream.launch(host, 0.05)
            if waits:
                stream.wait()

    if waits:
        with pytest.warns(UserWarning, match="the device waited for the host"):
            device_ms(backward)
    else:
        with warnings.catch_warnings(action="error"):
            assert device_ms(backward) == pytest.approx(0.25)


def test_ranks_use_the_gpus_that_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _visible([0, 3]) == "0,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert _visible([0, 1]) == "2,5"
    with pytest.raises(RuntimeError, match="GPU 2 is asked for, and CUDA_VISIBLE_DEVICES=2,5 shows 2"):
        _visible([1, 2])
