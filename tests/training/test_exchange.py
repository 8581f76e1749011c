"""When shards are exchanged by copies, and in which memory; `test_spread` compares what is learned."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from mambalm.training import exchange, parallelism
from mambalm.training.exchange import Gather, ReduceScatter, refusal
from mambalm.training.precision import policy

CPU = torch.device("cpu")
TWO: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 0)


class Alone:
    """`exchange.Shared` of two ranks of which the other does what this one does, and of its meetings."""

    met: ClassVar[list[int]] = []

    def __init__(self, count: int, dtype: torch.dtype, *_: Any) -> None:
        self.own = torch.zeros(count, dtype=dtype)
        self.of = [self.own.view(2, -1)] * 2

    def meet(self) -> None:
        self.met.append(self.own.data_ptr())


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "Shared", Alone)
    monkeypatch.setattr(Alone, "met", [])


@pytest.fixture
def single() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def gather(through: Gather, size: int) -> torch.Tensor:
    slot = through.allocate((size,), dtype=torch.float32, device=CPU)
    through(slot, slot[: size // 2], TWO)
    return slot


@pytest.mark.usefixtures("alone")
def test_a_slot_is_lent_once() -> None:
    through = Gather(TWO)
    kept = [gather(through, size) for size in (8, 8, 4, 8)]
    assert len({slot.data_ptr() for slot in kept}) == 4
    with pytest.raises(RuntimeError, match="more than 3 groups are gathered at once"):
        gather(through, 8)
    del kept
    assert len({gather(through, 8).data_ptr() for _ in range(9)}) == Gather.NUMBER


@pytest.mark.usefixtures("alone")
def test_a_slot_waits_for_the_gather_but_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have read its last contents when they come to the one behind that."""
    waited: list[int] = []
    counted = iter(range(100))
    stream = SimpleNamespace(record_event=lambda: next(counted), wait_event=waited.append)
    monkeypatch.setattr(torch.cpu, "current_stream", lambda: stream)
    through = Gather(TWO)
    for _ in range(6):
        gather(through, 8)
    assert waited == [0, 1, 2, 3], "by the third, fourth, fifth and sixth"


@pytest.mark.usefixtures("alone")
def test_averages_alone_in_their_own_dtype() -> None:
    through, given = ReduceScatter(TWO), torch.arange(8.0)
    averaged = torch.empty(4)
    for _ in range(5):
        through(averaged, given, TWO, dist.ReduceOp.AVG)
    assert len(set(Alone.met)) == ReduceScatter.NUMBER
    with pytest.raises(ValueError, match="averaged by copies"):
        through(averaged, given, TWO, dist.ReduceOp.SUM)


def test_why_not(single: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(single, CPU) == "they are on cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: False)
    assert refusal(single, torch.device("cuda", 0)) == "GPU 0 has no access to the memory of GPU 1"
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)

    def unmappable(*_: Any) -> None:
        raise RuntimeError("no permission")

    monkeypatch.setattr(exchange, "Shared", unmappable)
    assert refusal(single, torch.device("cuda", 0)) == "they cannot map each other's memory: no permission"
    monkeypatch.setattr(exchange, "Shared", lambda *_: None)
    assert refusal(single, torch.device("cuda", 0)) is None

    def of_two(found: list[Any], mine: Any, group: Any) -> None:
        found[:] = [mine, "another host" if mine == socket.gethostname() else mine]

    monkeypatch.setattr(dist, "all_gather_object", of_two)
    assert refusal(TWO, torch.device("cuda", 0)) == "they are on 2 hosts (parallel.mode=hsdp shards within each)"


def test_what_is_not_by_copies_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallelism, "refusal", lambda *_: "they are on 2 hosts")
    with pytest.warns(UserWarning, match="since they are on 2 hosts: NCCL's kernels do, which take multiprocessors"):
        parallelism._exchange([], TWO, policy("bf16", CPU))
