"""The benchmarks of whole models: what stops them, what they count, and that the sides do the same work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mambalm.diagnostics.benchmark import (
    checkpoint_subject,
    measure_generate,
    measure_memory,
    measure_restore,
    measure_throughput,
    transformer_beside,
)
from mambalm.diagnostics.benchmark.measuring import GIB, Memory, attempt, environment
from mambalm.diagnostics.benchmark.memory import Limits
from mambalm.diagnostics.benchmark.subjects import Run, Subject
from mambalm.diagnostics.benchmark.throughput import sample_points
from mambalm.generation import Sampling, Settings

CPU = torch.device("cpu")


class FakeRun(Run):
    """Fails above a number of tokens, and waits at each step."""

    def __init__(self, subject: FakeSubject) -> None:
        super().__init__(subject, 1)
        self.fake = subject

    def _read(self, ids: Tensor) -> None:
        self.fake.calls.append(ids.shape[1])
        if self.fake.fails(self.position + ids.shape[1], ids.shape[1]):
            raise torch.OutOfMemoryError("no more")

    def write(self, count: int) -> Iterator[None]:
        for _ in range(count):
            time.sleep(self.fake.wait(self.position))
            self.position += 1
            self.fake.steps += 1
            yield


class FakeSubject(Subject):
    def __init__(
        self,
        fails: Callable[[int, int], bool] = lambda position, length: False,
        wait: Callable[[int], float] = lambda position: 0.0,
    ) -> None:
        self.name, self.model, self.fails, self.wait = "fake", None, fails, wait
        self.calls: list[int] = []
        self.steps = 0

    device = CPU  # type: ignore[assignment]
    vocabulary = 7  # type: ignore[assignment]

    def begin(self, batch: int) -> Run:
        return FakeRun(self)

    def read(self, prompts: Tensor) -> None:
        self.calls.append(prompts.shape[1])
        time.sleep(0.01)

    def generate(self, prompts: Tensor, settings: Settings, heard: Callable[[list[int]], None]) -> None:
        for position in range(settings.max_new_tokens):
            time.sleep(self.wait(position))
            heard([0])


def limits(**values: float) -> Limits:
    return Limits(**{"bytes": GIB, "shortest": 4, "longest": 64, "chunk_size": 4, "steps": 2, **values})  # type: ignore[arg-type]


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake subject holds nothing: the process's own memory is none of its business."""
    monkeypatch.setattr(Memory, "peak", lambda self: 1000)
    monkeypatch.setattr(Memory, "total", 2 * GIB)
    for user in ("memory", "throughput"):
        monkeypatch.setattr(f"mambalm.diagnostics.benchmark.{user}.release", lambda device: None)


@pytest.mark.usefixtures("no_memory")
def test_memory_stops_the_doubling() -> None:
    fake = FakeSubject(fails=lambda position, length: length > 20)
    found = measure_memory(fake, "parallel", limits())
    assert (found["longest"], found["stopped_by"]) == (16, "memory")
    assert fake.calls == [4, 8, 16, 32]
    assert [row["length"] for row in found["lengths"]] == [4, 8, 16]
    found = measure_memory(fake, "chunked", limits())
    assert (found["longest"], found["stopped_by"]) == (64, "longest asked for")
    grows = FakeSubject(fails=lambda position, length: position > 40)
    found = measure_memory(grows, "chunked", limits())
    assert (found["longest"], found["stopped_by"]) == (32, "memory")
    # What was read for one length is not read again for the next.
    assert sum(grows.calls) == 44
    assert measure_memory(FakeSubject(lambda *_: True), "parallel", limits())["longest"] == 0


@pytest.mark.usefixtures("no_memory")
def test_the_cap_counts_where_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([1, 2, GIB + 1])
    monkeypatch.setattr(Memory, "peak", lambda self: next(peaks))
    found = measure_memory(FakeSubject(), "parallel", limits())
    assert (found["longest"], found["stopped_by"]) == (8, "memory")
    with pytest.raises(ValueError, match=r"needs a cpu with 4 GiB, and this one has 2: give a smaller --memory-gib"):
        measure_memory(FakeSubject(), "parallel", limits(bytes=2 * GIB))


@pytest.mark.usefixtures("no_memory")
def test_token_by_token_is_sampled_where_it_takes_too_long() -> None:
    fast = FakeSubject()
    found = measure_memory(fast, "token by token", limits())
    assert [row["sampled"] for row in found["lengths"]] == [False] * 5
    assert fast.steps == 63
    slow = FakeSubject(wait=lambda _: 0.01)
    found = measure_memory(slow, "token by token", limits(seconds=0.8))
    assert [row["sampled"] for row in found["lengths"]][-1]
    assert found["lengths"][-1]["steps"] == 2
    assert slow.steps < 40


@pytest.mark.usefixtures("no_memory")
def test_time_stops_the_doubling() -> None:
    fake = FakeSubject(fails=lambda position, length: bool(time.sleep(0.002 * length)))
    found = measure_memory(fake, "parallel", limits(seconds=0.1))
    assert found["stopped_by"] == "time"
    assert 4 <= found["longest"] < 64
    with pytest.raises(ValueError, match="longest is 100; it must be a power of two"):
        limits(longest=100)
    with pytest.raises(ValueError, match="there is no mode 'backwards'"):
        measure_memory(fake, "backwards", limits())


@pytest.mark.usefixtures("no_memory")
def test_throughput_samples_and_then_writes_all() -> None:
    assert sample_points(130_000) == [128, 2000, 4000, 8000, 16000, 32000, 64000, 128000]
    assert sample_points(100) == [128]
    found = measure_throughput(FakeSubject(), 2100, steps=3, chunk_size=64)
    assert [row["position"] for row in found["sampled"]] == [128, 2000]
    assert [row["position"] for row in found["whole"]] == [128, 1024, 2048, 2100]
    assert found["peak_grew_by_bytes"] == 0
    assert found["paired"]["positions"] == [128, 2090]
    growing = FakeSubject(wait=lambda position: 1e-6 * position)
    found = measure_throughput(growing, 2100, steps=3, chunk_size=64)
    assert found["slower_at_the_end_by"] > 0.2
    assert found["paired"]["slower_at_the_end_by"] > 0.2
    found = measure_throughput(FakeSubject(wait=lambda _: 1e-3), 2100, steps=3, chunk_size=64, seconds=0.5)
    assert found["whole"] is None
    assert found["whole_skipped"].startswith("by the sampled speeds it takes")
    found = measure_throughput(FakeSubject(fails=lambda position, _: position > 1000), 2100, steps=3, chunk_size=64)
    assert found["sampled"][-1] == {"position": 2000, "out_of_memory": True}
    assert found["whole_skipped"] == "out of memory at a sampled position"
    assert "paired" not in found


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory")])
def test_no_memory_is_no_result(error: Exception) -> None:
    def fail() -> int:
        raise error

    assert attempt(fail, CPU) is None
    assert attempt(lambda: 3, CPU) == 3
    with pytest.raises(RuntimeError, match="shapes differ"):
        attempt(lambda: (_ for _ in ()).throw(RuntimeError("shapes differ")), CPU)


def test_the_peak_is_of_what_was_in_use() -> None:
    memory = Memory(CPU)
    memory.reset()
    before = memory.peak()
    torch.ones(2**24)
    assert memory.peak() - before >= 0.9 * 2**26
    memory.reset()
    assert memory.peak() - before < 2**25
    assert environment(CPU)["versions"]["torch"] == torch.__version__
    assert environment(CPU, "abc")["commit"] == "abc"


def test_both_sides_write_the_same(tiny_checkpoint: Path) -> None:
    ours = checkpoint_subject(str(tiny_checkpoint), None, CPU)
    theirs = checkpoint_subject(str(tiny_checkpoint), None, CPU, transformers=True)
    assert (ours.describe()["class"], theirs.describe()["class"]) == (
        "mambalm.MambaForCausalLM",
        "transformers.MambaForCausalLM",
    )
    prompts = torch.randint(1, 300, (2, 9))
    found = [measure_generate(one, prompts, Settings(max_new_tokens=6), repeats=2) for one in (ours, theirs)]
    assert found[0]["tokens"] == found[1]["tokens"]
    assert [(one["generated"], one["batch"]) for one in found] == [(6, 2)] * 2
    assert found[0]["prompt_seconds"] > 0
    assert found[0]["prompt_over_bare_reading"] > 0
    sampled = Settings(sampling=Sampling(temperature=0.9, top_k=5, top_p=0.9, min_p=0.01), max_new_tokens=3, seed=1)
    assert all(len(measure_generate(one, prompts, sampled, 1)["tokens"][0]) == 3 for one in (ours, theirs))
    with pytest.raises(ValueError, match="two new tokens at least"):
        measure_generate(ours, prompts, Settings(max_new_tokens=1))
    assert "forget their state" in measure_memory(theirs, "chunked", limits())["refused"]


def test_bare_reading_is_that_of_generate(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the same graphs, where there are some: else the first token would be compared with a slower reading."""
    ours, read = checkpoint_subject(str(tiny_checkpoint), None, CPU), []
    graphs = SimpleNamespace(read=lambda ids, state: read.append(ids.tolist()))
    monkeypatch.setattr(ours.engine, "chunks", graphs)  # type: ignore[attr-defined]
    prompts = torch.randint(1, 300, (2, 9))
    measure_generate(ours, prompts, Settings(max_new_tokens=2), repeats=1)
    assert read == [prompts.tolist()] * 4


def test_runs_read_on(tiny_checkpoint: Path) -> None:
    ours = checkpoint_subject(str(tiny_checkpoint), None, CPU)
    beside = transformer_beside(ours)
    assert beside.describe()["attention"] == "sdpa"
    assert beside.reads_in_chunks
    assert not beside.is_recurrent
    for subject in (ours, beside):
        whole, parts = subject.begin(1), subject.begin(1)
        torch.manual_seed(0)
        ids = torch.randint(300, (1, 20))
        whole._read(ids)
        for piece in ids.split(7, dim=1):
            parts._read(piece)
            parts.position += piece.shape[1]
        assert torch.allclose(whole._logits, parts._logits, atol=1e-4)  # type: ignore[attr-defined]
        assert len(list(parts.write(5))) == 5
        assert parts.position == 25


def test_runs_read_as_the_engine_does(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its graphs, so that a first token is not compared with a slower reading."""
    subject = checkpoint_subject(str(tiny_checkpoint), None, CPU)
    graphs = SimpleNamespace(asked=0)
    monkeypatch.setattr(graphs, "read", lambda *_: setattr(graphs, "asked", graphs.asked + 1), raising=False)
    monkeypatch.setattr(subject, "engine", SimpleNamespace(chunks=graphs))
    subject.begin(1).read(20)
    assert graphs.asked == 1


def test_restored_states_are_the_same(tiny_checkpoint: Path) -> None:
    ours = checkpoint_subject(str(tiny_checkpoint), None, CPU)
    found = measure_restore(ours, 30, repeats=2)
    assert found["next_logits_equal"]
    assert found["file_bytes"] > found["state_bytes"] > 0
    with pytest.raises(ValueError, match="only its models keep state files"):
        measure_restore(transformer_beside(ours), 30)
