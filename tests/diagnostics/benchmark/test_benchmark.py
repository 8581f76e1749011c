"""The benchmarks of whole models: what stops them, what they count, and that the sides do the same work."""

from __future__ import annotations

import gc
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
from mambalm.diagnostics.benchmark.subjects import Run, Subject, TransformersSubject
from mambalm.diagnostics.benchmark.throughput import sample_points
from mambalm.generation import Sampling, Settings
from mambalm.models.shapes import random_model

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
    gc.collect()  # what earlier tests left, freed meanwhile, would hide what is allocated here
    memory.reset()
    before = memory.peak()
    torch.ones(2**26)
    assert memory.peak() - before >= 0.9 * 2**28
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


@pytest.fixture
def a_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which goes on where a test says so."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


class Timed(FakeSubject):
    """Takes 3 s for a first token and 0.5 s for each other, ten times as much the first time; 2 s to read."""

    def __init__(self, now: list[float]) -> None:
        super().__init__()
        self.now, self.slow = now, 10.0

    def read(self, prompts: Tensor) -> None:
        self.now[0] += 2.0

    def generate(self, prompts: Tensor, settings: Settings, heard: Callable[[list[int]], None]) -> None:
        for position in range(settings.max_new_tokens):
            self.now[0] += self.slow * (0.5 if position else 3.0)
            heard([position] * len(prompts))
        self.slow = 1.0


def test_what_a_first_token_and_the_others_take(a_clock: list[float]) -> None:
    prompts = torch.zeros(4, 10, dtype=torch.long)
    found = measure_generate(Timed(a_clock), prompts, Settings(max_new_tokens=6), repeats=1)
    expected = {"prompt_seconds": 3.0, "prompt_over_bare_reading": 1.5, "prompt_tokens_per_second": 40 / 3}
    expected |= {"decode_ms_per_token": 500.0, "decode_tokens_per_second": 8.0, "generated": 6, "batch": 4}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=0.1)
    assert found["tokens"] == [list(range(6))] * 4


def test_each_blocks_peak_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [0]
    monkeypatch.setattr(Memory, "reset", lambda self: peak.__setitem__(0, 1000))
    monkeypatch.setattr(Memory, "peak", lambda self: peak[0])
    high = {200: 5000, 1500: 3000, 2090: 2000}

    def wait(position: int) -> float:
        peak[0] = max(peak[0], high.get(position, 0))
        return 0.0

    found = measure_throughput(FakeSubject(wait=wait), 2100, steps=1, chunk_size=64)
    assert [row["peak_bytes"] for row in found["whole"]] == [1000, 5000, 3000, 2000]
    assert found["peak_grew_by_bytes"] == -3000


def test_the_cap_of_a_gpu_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(Memory, "total", 4 * GIB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append(share))
    with pytest.raises(RuntimeError, match="within"), Memory(torch.device("cuda")).capped(GIB):
        raise RuntimeError("within")
    assert told == [0.25, 1.0]


def test_transformers_side_samples_as_it_is_told(tiny_checkpoint: Path) -> None:
    """And ends at no token, as ours does not."""
    ours = checkpoint_subject(str(tiny_checkpoint), None, CPU)
    prompts = torch.randint(1, 300, (2, 9))
    greedy = measure_generate(ours, prompts, Settings(max_new_tokens=6), 1)["tokens"]
    ours.model.config.eos_token_id = ours.model.generation_config.eos_token_id = greedy[0][1]
    stock = random_model(ours.model.config, torch.float32, "cpu", transformers=True)
    stock.load_state_dict(ours.model.state_dict())
    assert stock.generation_config.eos_token_id == greedy[0][1]
    theirs = TransformersSubject("stock", stock)
    for way in (Sampling(), Sampling(repetition_penalty=5.0), Sampling(temperature=30.0, top_k=1)):
        settings = Settings(sampling=way, max_new_tokens=6, seed=1)
        found = [measure_generate(one, prompts, settings, 1)["tokens"] for one in (ours, theirs)]
        assert found[0] == found[1]
        assert (found[0] == greedy) == (way.repetition_penalty == 1)


def test_bare_reading_is_that_of_generate(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the same graphs, where there are some: else the first token would be compared with a slower reading."""
    ours, read = checkpoint_subject(str(tiny_checkpoint), None, CPU), []
    graphs = SimpleNamespace(read=lambda ids, state: read.append(ids.tolist()))
    monkeypatch.setattr(ours.engine, "chunks", graphs)  # type: ignore[attr-defined]
    prompts = torch.randint(1, 300, (2, 9))
    measure_generate(ours, prompts, Settings(max_new_tokens=2), repeats=1)
    assert read == [prompts.tolist()] * 4
    # What measures memory captures nothing.
    ours.begin(1).read(20)
    assert len(read) == 4


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


def test_restored_states_are_the_same(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = checkpoint_subject(str(tiny_checkpoint), None, CPU)
    found = measure_restore(ours, 30, repeats=2)
    assert found["next_logits_equal"]
    assert found["file_bytes"] > found["state_bytes"] > 0
    logits = iter(range(9))
    monkeypatch.setattr("mambalm.diagnostics.benchmark.restore.step", lambda *_: (torch.tensor(next(logits)), None))
    assert not measure_restore(ours, 30, repeats=1)["next_logits_equal"]
    with pytest.raises(ValueError, match="only its models keep state files"):
        measure_restore(transformer_beside(ours), 30)
