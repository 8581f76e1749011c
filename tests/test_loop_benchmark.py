"""The benchmark of the training loop: what it counts, and that its bare steps leave the run as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.loop import WARM_UP, Clock, Over, bare_steps
from mambalm.training.session import Folder, Watch
from tests.training import runs


def test_rounds_of_the_loop_and_of_bare_steps_take_turns(tmp_path: Path) -> None:
    runs.write_data(tmp_path)
    stage = {"name": "one", "tokens": "1M", "context": 16, "batch": 2, "micro_batch": 2}
    changes = {
        "stages": [stage],
        "checkpoints": {"every": WARM_UP + 3},
        "data": {"sources": [{"path": str(tmp_path / "tokens")}]},
    }
    trainer = runs.trainer(runs.recipe(tmp_path, changes), tmp_path / "run")
    clock = Clock(trainer=trainer, bare=bare_steps(trainer), steps=2, rounds=2)
    with pytest.raises(Over):
        Watch(trainer, Folder(tmp_path / "run"), None, None, None).run(clock)
    trainer.checkpoints.wait()
    assert trainer.checkpoints.latest() == WARM_UP + 3
    assert len(clock.times[0]) == 2
    assert len(clock.times[1]) == trainer.position.step - WARM_UP - 2 >= 2
    speeds = clock.speeds()  # rounded
    assert speeds["loop_over_bare"] == pytest.approx(speeds["loop_ms"] / speeds["bare_ms"] - 1, abs=1e-3)
    total = sum(clock.times[1])
    lost = clock.checkpoint()["checkpoint_seconds_lost"]
    assert lost == pytest.approx(total - len(clock.times[1]) * speeds["loop_ms"] / 1e3, abs=2e-3)


def test_bare_steps_change_no_parameter(tmp_path: Path) -> None:
    runs.write_data(tmp_path)
    trainer = runs.trainer(runs.recipe(tmp_path), tmp_path / "run")
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    assert bare_steps(trainer)(2) > 0
    after = list(trainer.model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
