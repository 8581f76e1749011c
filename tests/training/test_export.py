"""A run's checkpoints as models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MambaForCausalLM

import mambalm
from mambalm.training.export import export_checkpoint
from mambalm.training.recipe_files import dump
from tests.training.runs import finish, recipe, trainer, write_data


def test_any_checkpoint_of_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path)
    made = recipe(tmp_path, {"checkpoints": {"every": 2, "keep_last": 2}})
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"is no run's folder: it has no recipe\.yaml"):
        export_checkpoint(run, tmp_path / "model")
    run.mkdir()
    (run / "recipe.yaml").write_text(dump(made))
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        export_checkpoint(run, tmp_path / "model")
    training = trainer(made, run)
    weights = {}
    for step in (2, 4):
        finish(training, step)
        training.save()
        weights[step] = {name: value.clone() for name, value in training.network.state_dict().items()}
    training.checkpoints.wait()
    assert export_checkpoint(run, tmp_path / "latest") == 4
    assert export_checkpoint(run, tmp_path / "half", step=2, dtype=torch.bfloat16) == 2
    assert capfd.readouterr().err == "", "transformers' bar is not among ours"
    model = mambalm.load(tmp_path / "latest")
    assert all(torch.equal(value, weights[4][name]) for name, value in model.state_dict().items())
    stock = MambaForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert all(torch.equal(value, weights[2][name].bfloat16()) for name, value in stock.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "half")) == len(training.tokenizer)
    with pytest.raises(ValueError, match=r"no checkpoint .*step-3; those there are of steps \[2, 4\]"):
        export_checkpoint(run, tmp_path / "other", step=3)
    assert not (tmp_path / "other").exists()
