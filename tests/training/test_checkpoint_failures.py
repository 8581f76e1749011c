"""What happens to checkpoints when something fails: the last one is intact, and the message says what to do."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager

from mambalm.training.checkpoint import Checkpoints
from mambalm.training.distributed import Ranks
from tests.training.spread import SmallRun

ROOT = Path(__file__).parents[2]


def small_run(steps: int = 0, **job: object) -> SmallRun:
    run = SmallRun(dict(job), Ranks())
    for _ in range(steps):
        run.advance()
    return run


def weights(run: SmallRun) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.network.state_dict().items()}


def save(kept: Checkpoints, run: SmallRun) -> None:
    kept.save(run.step, run.state())
    kept.wait()


def load(folder: Path, run: SmallRun, step: int | None = None) -> int:
    state = run.state()
    Checkpoints(folder).load(state, step)
    return state["progress"]["step"]


def test_a_checkpoint_is_of_the_moment_of_its_save(tmp_path: Path) -> None:
    run, kept = small_run(2), Checkpoints(tmp_path)
    before = weights(run)
    kept.save(run.step, run.state())
    run.advance()
    kept.wait()
    other = small_run()
    assert load(tmp_path, other) == 2
    assert all(torch.equal(value, before[name]) for name, value in weights(other).items())
    other.step = 2
    # Adam's moments too: the next step is the same bit for bit.
    other.advance()
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(other).items())


def test_what_is_kept(tmp_path: Path) -> None:
    run, kept = small_run(), Checkpoints(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        kept.save(step, run.state())
    kept.wait()
    assert kept.steps() == [4, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-4", "step-6", "step-7"]


def test_many_checkpoints_where_torch_closes_what_copies_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, stage = dcp.async_save, DefaultStager._stage

    def copy_as_torch_2_11(self: Any, *arguments: Any, **named: Any) -> Any:
        staged = stage(self, *arguments, **named)
        self._state_dict_stager.close()
        return staged

    def begin_as_torch_2_11(*arguments: Any, **named: Any) -> Any:
        written = begin(*arguments, **named)
        written.add_done_callback(lambda _: named["async_stager"].close())
        return written

    monkeypatch.setattr(DefaultStager, "_stage", copy_as_torch_2_11)
    monkeypatch.setattr(dcp, "async_save", begin_as_torch_2_11)
    run, kept = small_run(1), Checkpoints(tmp_path)
    save(kept, run)
    run.advance()
    save(kept, run)
    other = small_run()
    assert load(tmp_path, other) == 2
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(other).items())


def test_memory_is_made_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's part, with stand-ins for it: the first checkpoint is copied to where the preparation was."""
    run, kept, copied = small_run(1), Checkpoints(tmp_path), []
    stage = DefaultStager.stage

    def note(self: Any, state: Any, **named: Any) -> Any:
        staged = stage(self, state, **named)
        copied.append({name: value.data_ptr() for name, value in staged["model"].items()})
        return staged

    monkeypatch.setattr(DefaultStager, "stage", note)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch, "Stream", lambda device: contextlib.nullcontext())
    kept.prepare(run.state(), torch.device("cuda", 0))
    run.advance()
    save(kept, run)
    assert copied[0] == copied[1]
    assert not kept.is_preparing
    other = small_run()
    assert load(tmp_path, other) == 2
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(other).items())
    assert sys.getswitchinterval() == pytest.approx(0.005)


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file can become larger than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 10_000], ids=["at once", "in the shards"])
def test_a_full_disk(size: int, tmp_path: Path) -> None:
    run, kept = small_run(1), Checkpoints(tmp_path)
    save(kept, run)
    run.advance()
    with small_disk(size), pytest.raises(OSError, match=r"cannot write a checkpoint into .*steps \[1\] are intact"):
        save(kept, run)
    assert load(tmp_path, small_run()) == 1
    save(kept, run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "progress.pt"])
@pytest.mark.parametrize(
    "damage",
    [lambda content: content[: len(content) // 2], lambda content: b"", lambda content: b"\x00" * len(content)],
    ids=["cut off", "empty", "zeros"],
)
def test_a_damaged_file(name: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    run, kept = small_run(1), Checkpoints(tmp_path)
    save(kept, run)
    run.advance()
    save(kept, run)
    file = tmp_path / "step-2" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"step-2 is damaged .*remove it to go on from step-1"):
        load(tmp_path, small_run())
    assert load(tmp_path, small_run(), 1) == 1


def test_another_vocabulary_and_another_model(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path), small_run(1))
    other = small_run(vocabulary=72)
    before = weights(other)
    with pytest.raises(ValueError, match=r"another vocabulary: .*\(60, 16\) there and \(72, 16\) here"):
        load(tmp_path, other)
    assert all(torch.equal(value, before[name]) for name, value in weights(other).items())
    with pytest.raises(ValueError, match="of another model: only one of them has"):
        load(tmp_path, small_run(family="mamba2"))
    with pytest.raises(ValueError, match=r"no checkpoint .*step-9; those there are of steps \[1\]"):
        load(tmp_path, small_run(), 9)


def test_killed_between_two_names(tmp_path: Path) -> None:
    """A step that comes again takes the place of the one before: until it has, that one counts."""
    save(Checkpoints(tmp_path), small_run(1))
    (tmp_path / "step-1").rename(tmp_path / ".step-1.replaced")
    # One who only reads, such as an export beside the run, does not get between the two names.
    assert Checkpoints(tmp_path, read_only=True).steps() == []
    assert Checkpoints(tmp_path).latest() == 1
    save(Checkpoints(tmp_path), small_run(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


SAVING = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
import torch
# Sums depend on the number of threads.
torch.set_num_threads({threads})
from mambalm.training.checkpoint import Checkpoints
from tests.training.test_checkpoint_failures import small_run
run, kept = small_run(), Checkpoints(Path({folder!r}))
while True:
    run.advance()
    kept.save(run.step, run.state())
    print(run.step, flush=True)
"""


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    source = SAVING.format(path=[p for p in sys.path if p], folder=str(tmp_path), threads=torch.get_num_threads())
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    # It saves all the time: any moment from the second save on is in the middle of one.
    for _ in range(3):
        process.stdout.readline()
    time.sleep(time.time() % 0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = small_run()
    step = load(tmp_path, resumed)
    assert step >= 1
    whole = small_run(step)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    resumed.step = step
    save(Checkpoints(tmp_path), resumed)
    assert not list(tmp_path.glob(".step-*"))


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from mambalm.training.checkpoint import Checkpoints
from tests.training.test_checkpoint_failures import load, same_weights, small_run

# What creates, renames, empties or removes; reading changes nothing.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open")
folder, again = Path({folder!r}), {again}
runs = [small_run(step) for step in range(4)]


def in_child(work):
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def save(*steps, at=None):
    def work():
        left = at

        def count(event, arguments):
            nonlocal left
            if left is None or event not in CHANGES or str(folder) not in str(arguments[0]):
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        kept = Checkpoints(folder, keep_last=2)
        for step in steps:
            # A step that comes again after a return to an earlier checkpoint, with other weights.
            kept.save(step, runs[3 if at is not None else step].state())
            kept.wait()
    return in_child(work)


killed = 0
while True:
    shutil.rmtree(folder)
    assert not save(1, 2)
    if not save(2 if again else 3, at=killed):
        break
    resumed = small_run()
    step = load(folder, resumed)
    assert Checkpoints(folder).latest() == (3 if step == 3 and not again else 2), (killed, step)
    assert step in (2, 3) and same_weights(resumed, runs[step]), (killed, step)
    killed += 1
print(killed)
"""


def same_weights(one: SmallRun, other: SmallRun) -> bool:
    kept = weights(other)
    return all(torch.equal(value, kept[name]) for name, value in weights(one).items())


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step again"])
def test_kill_9_before_every_file_operation(again: bool, tmp_path: Path) -> None:
    source = KILLED.format(path=[p for p in sys.path if p], folder=str(tmp_path), again=again)
    process = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert process.returncode == 0, process.stderr[-3000:]
    # The folder, the progress, a shard, the metadata, the names; and what is left of others.
    assert int(process.stdout.split()[-1]) >= 8
