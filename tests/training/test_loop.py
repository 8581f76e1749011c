"""A run that is stopped anywhere and resumed is the run that was not, bit for bit; what it keeps survives a kill."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig

from mambalm.data.streams import SegmentStreams
from mambalm.data.tokenizer import train_tokenizer
from mambalm.models.mamba import MambaForCausalLM
from mambalm.training.budget import TimeBudget
from mambalm.training.files import export, replacing
from mambalm.training.interruption import stop_requests
from mambalm.training.loop import Run, next_token_loss, train
from mambalm.training.optimizer import adamw
from mambalm.training.precision import fastest_dtype
from mambalm.training.schedule import WarmupStableDecay

STEPS = 12


@dataclass(frozen=True)
class TokenBudget:
    """A run of so many tokens, which no clock ends."""

    tokens: int

    def horizon(self, tokens: int, seconds: float) -> float:
        return self.tokens

    def is_spent(self, tokens: int, seconds: float) -> bool:
        return tokens >= self.tokens


def make_run(seed: int = 0, vocab_size: int = 40) -> Run:
    config = MambaConfig(vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, state_size=4, use_cache=False)
    torch.manual_seed(seed)
    model = MambaForCausalLM(config)
    tokens = torch.randint(0, vocab_size, (900,), generator=torch.Generator().manual_seed(1))
    streams = SegmentStreams(tokens, batch_size=3, length=8, chunks=3, groups=2)
    schedule = WarmupStableDecay(peak=1e-2, warmup=50, decay=0.5)
    budget = TokenBudget(STEPS * 24)
    return Run(model, adamw(model), streams, schedule, budget, identity={"corpus": "tiny"})


def finish(run: Run, steps: int = STEPS) -> None:
    """Train until the budget is spent or so many steps are done."""
    train(run, save=lambda: None, save_every=1e9, on_step=lambda _: None, should_stop=lambda: run.step >= steps)


@pytest.mark.parametrize("stop", random.Random(0).sample(range(1, STEPS), 4))
def test_a_resumed_run_equals_the_uninterrupted(tmp_path: Path, stop: int) -> None:
    whole, first, second = make_run(), make_run(), make_run(seed=7)
    finish(whole)
    finish(first, stop)
    first.save(tmp_path / "run.pt")
    drawn = torch.rand(3)
    second.load(tmp_path / "run.pt")
    assert torch.equal(torch.rand(3), drawn)
    assert second.seconds == first.seconds > 0
    finish(second)
    assert second.losses == whole.losses
    assert (second.step, second.tokens) == (STEPS, STEPS * 24)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    assert set(second.states) == {0, 1}
    for group, state in whole.states.items():
        for one, two in zip(state.layers, second.states[group].layers, strict=True):
            assert torch.equal(one.ssm, two.ssm)
            assert torch.equal(one.conv, two.conv)


def test_training_learns_and_hands_the_state_on() -> None:
    run = make_run()
    # A text that repeats with period 16, two chunks, is predictable only across them.
    run.streams = SegmentStreams(torch.arange(1000) % 16, batch_size=3, length=8, chunks=3)
    run.budget = TokenBudget(40 * 24)
    finish(run, 40)
    assert run.losses[-1] < 0.5 * run.losses[0]
    assert run.states[0].position.tolist() == [8 * (39 % 3 + 1)] * 3
    batch = run.streams[1]
    _, before = next_token_loss(run.model, run.streams[0], None)
    with_state, _ = next_token_loss(run.model, batch, before.detach())
    without, _ = next_token_loss(run.model, batch, None)
    assert with_state < without


def test_the_learning_rate_ends_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) / 8)
    run = make_run()
    run.budget = TimeBudget(4.0)
    rates: list[float] = []
    train(
        run,
        save=lambda: None,
        save_every=1e9,
        on_step=lambda report: rates.append(report.learning_rate),
        should_stop=lambda: False,
    )
    # An eighth of a second for each step; the decay takes the second half.
    assert (run.step, run.seconds) == (32, 4.0)
    assert rates[2:16] == [1e-2] * 14
    assert rates[24] == pytest.approx(1e-2 * 7.5 / 16)
    assert rates[31] == pytest.approx(1e-2 * 0.5 / 16)


def test_saves_on_the_way_and_at_the_end() -> None:
    run, saved = make_run(), []
    train(
        run,
        save=lambda: saved.append(run.step),
        save_every=0.0,
        on_step=lambda _: None,
        should_stop=lambda: run.step == 3,
    )
    assert saved == [1, 2, 3, 3]


def test_a_run_of_another_identity_is_refused(tmp_path: Path) -> None:
    run = make_run()
    run.save(tmp_path / "run.pt")
    run.identity["corpus"] = "another"
    with pytest.raises(ValueError, match=r"its corpus is tiny, here it is another\. Restart"):
        run.load(tmp_path / "run.pt")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no" + data])
def test_a_damaged_file_is_named(tmp_path: Path, damage) -> None:
    path = tmp_path / "run.pt"
    make_run().save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"run\.pt is damaged or no saved run: restart"):
        make_run().load(path)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    for other in ({"weight": torch.zeros(2)}, torch.zeros(2)):
        torch.save(other, tmp_path / "run.pt")
        with pytest.raises(ValueError, match=r"run\.pt is damaged or no saved run: restart"):
            make_run().load(tmp_path / "run.pt")


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    run = make_run()
    with torch.no_grad():
        run.model.backbone.norm_f.weight[0] = float("nan")
    before = run.model.lm_head.weight.clone()
    with pytest.raises(RuntimeError, match="step 1: loss nan"):
        run.advance()
    assert torch.equal(run.model.lm_head.weight, before)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*No space left on device; an older version of it is intact"):
        write()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


KILLED = """
import sys
from pathlib import Path
import torch
# Sums are split by threads: bit for bit the same only with as many of them.
torch.set_num_threads({threads})
sys.path[:0] = {path!r}
from tests.training.test_loop import make_run, save_all
folder = Path({folder!r})
run = make_run()
while True:
    run.advance()
    save_all(run, folder)
    print(run.step, flush=True)
"""


def save_all(run: Run, folder: Path) -> None:
    run.save(folder / "run.pt")
    export(run.model, train_tokenizer(["text"], 257), folder / "model")


def test_kill_9_while_saving_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    source = KILLED.format(path=[p for p in sys.path if p], folder=str(tmp_path), threads=torch.get_num_threads())
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    # It saves all the time: any moment after the second save is in the middle of one.
    for _ in range(2):
        process.stdout.readline()
    time.sleep(random.Random(os.getpid()).random() * 0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = make_run(seed=7)
    run.load(tmp_path / "run.pt")
    assert run.step >= 2
    model = MambaForCausalLM.from_pretrained(tmp_path / "model")
    whole = make_run()
    states = []
    for _ in range(run.step + 1):
        states.append({name: value.clone() for name, value in whole.model.state_dict().items()})
        whole.advance()
    found = [all(torch.equal(model.state_dict()[name], state[name]) for name in state) for state in states]
    # The export is that of the saved step or, killed between the two files, of the one before.
    assert any(found[run.step - 1 :])
    save_all(run, tmp_path)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in the foreground of a shell, whatever started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_asks_the_second_acts(interruptible: None) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as request:
        assert not request
        signal.raise_signal(signal.SIGINT)
        assert request
        assert request.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_ignored_signal_stays_ignored(interruptible: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_requests() as request:
        signal.raise_signal(signal.SIGINT)
        assert not request
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_fastest_dtype_is_one_that_trains() -> None:
    run = make_run()
    run.compute_dtype = fastest_dtype()
    assert run.compute_dtype in (torch.float32, torch.bfloat16)
    finish(run, 2)
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
