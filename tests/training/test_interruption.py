"""Runs that are stopped: by a full disk, a damaged file, a kill at any moment or a signal."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mambalm.training.checkpoint import Checkpoints
from mambalm.training.distributed import Ranks
from mambalm.training.metrics import read_metrics
from mambalm.training.recipe_files import dump
from mambalm.training.session import Folder, run
from mambalm.training.trainer import Trainer
from tests.training.runs import finish, recipe, trainer, write_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def test_a_full_disk_leaves_the_last_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(recipe(data), tmp_path)
    finish(made, 2)
    made.save()
    made.checkpoints.wait()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    finish(made, 3)
    with monkeypatch.context() as patch:
        patch.setattr("mambalm.training.checkpoint.flush", full)
        made.save()
        with pytest.raises(OSError, match=r"No space left on device; those of steps \[2\] are intact"):
            made.checkpoints.wait()
    assert made.checkpoints.steps() == [2]
    assert trainer(recipe(data), tmp_path).position.step == 2


def test_a_checkpoint_that_fails_stops_the_run_at_the_next_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Trainer.advance

    def slow(made: Trainer) -> Any:
        while made.checkpoints.is_writing:
            time.sleep(0.01)
        return advance(made)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "advance", slow)
    monkeypatch.setattr("mambalm.training.checkpoint.flush", full)
    settled = recipe(data, {"checkpoints": {"every": 4}})
    with pytest.raises(OSError, match=r"No space left on device; none was written before"):
        run(settled, tmp_path, Ranks(), Console(quiet=True))
    # During step 5 it was noticed at the latest.
    assert max(int(row["step"]) for row in read_metrics(tmp_path / "metrics.jsonl")) in (4, 5)


def test_an_unreadable_shard_is_named(data: Path, tmp_path: Path) -> None:
    made = trainer(recipe(data), tmp_path)
    finish(made, 2)
    made.save()
    made.checkpoints.wait()
    shard = next((tmp_path / "checkpoints" / "step-2").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-2 is damaged"):
        trainer(recipe(data), tmp_path)


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
import torch
# Sums depend on the number of threads.
torch.set_num_threads({threads})
from mambalm.training.recipe_files import load_recipe
from mambalm.training.distributed import Ranks
from mambalm.training.session import run
from rich.console import Console
run(load_recipe({recipe!r}), Path({folder!r}), Ranks(), Console(quiet=True))
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(data: Path, tmp_path: Path) -> None:
    """Killed while it trains and while it saves, again and again, it ends with the uninterrupted run's losses."""
    made = recipe(data, {"checkpoints": {"every": 1}})
    (tmp_path / "recipe.yaml").write_text(dump(made))
    names = {"recipe": str(tmp_path / "recipe.yaml"), "folder": str(tmp_path / "run")}
    source = KILLED.format(path=[path for path in sys.path if path], threads=torch.get_num_threads(), **names)
    moments = random.Random(os.getpid())
    kills, metrics = 0, tmp_path / "run" / "metrics.jsonl"
    for _ in range(5):
        known = len(list(read_metrics(metrics)))
        process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, cwd=ROOT)
        # A checkpoint follows every step: any moment after a new step is near one.
        while process.poll() is None and len(list(read_metrics(metrics))) <= known:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    if process.returncode:
        subprocess.run([sys.executable, "-c", source], check=True, cwd=ROOT)
    assert kills >= 1
    losses = [line["loss"] for line in read_metrics(metrics) if "loss" in line]
    assert losses == finish(trainer(recipe(data), tmp_path / "whole"))


def test_a_signal_saves_and_asks_to_be_requeued(data: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(recipe(data, {"checkpoints": {"every": 1000}})))
    folder = tmp_path / "run"
    arguments = ["-m", "mambalm", "train", str(tmp_path / "recipe.yaml"), "--output", str(folder), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None and len(list(read_metrics(folder / "metrics.jsonl"))) < 1:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert "the same command goes on" in output
    assert Folder(folder).checkpoints.is_dir()
    last = list(read_metrics(folder / "metrics.jsonl"))[-1]["step"]
    assert Checkpoints(folder / "checkpoints").latest() == last
