"""The run of a recipe: exact resumption, stages, accumulation, the guard."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from mambalm.data.token_files import METADATA, Metadata
from mambalm.training.checkpoint import Checkpoints
from mambalm.training.distributed import Ranks
from mambalm.training.guard import DivergedError, Verdict
from mambalm.training.metrics import read_metrics
from mambalm.training.recipe_files import dump
from mambalm.training.session import Profile, run
from mambalm.training.summary import steps_of
from mambalm.training.trainer import Trainer
from mambalm_cli import app
from tests.data.folders import write_folder
from tests.training.runs import VOCABULARY, finish, recipe, trainer, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Trainer]:
    """The losses of an uninterrupted run, and its trainer."""
    made = trainer(recipe(data), tmp_path_factory.mktemp("whole"))
    return finish(made), made


@pytest.mark.parametrize("stop", [0, 1, 6, 9, 12])
def test_a_resumed_run_equals_the_uninterrupted(
    data: Path, tmp_path: Path, whole: tuple[list[float], Trainer], stop: int
) -> None:
    losses, last = whole
    first = trainer(recipe(data), tmp_path)
    assert finish(first, stop) == losses[:stop]
    first.save()
    first.checkpoints.wait()
    torch.manual_seed(99)
    second = trainer(recipe(data), tmp_path)
    assert second.position.step == stop
    assert finish(second) == losses[stop:]
    for name, value in last.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], value), name


def test_stages_ramp_and_tokens(whole: tuple[list[float], Trainer], data: Path, tmp_path: Path) -> None:
    made = trainer(recipe(data), tmp_path)
    reports = []
    while not made.is_over:
        reports.append(made.advance().values)
    batches = [report["batch"] for report in reports]
    assert batches[0] == 2
    assert sorted(batches[: batches.index(8)]) == batches[: batches.index(8)]
    assert {report["batch"] for report in reports if report["stage"] == "long"} == {4}
    assert [report["stage"] for report in reports] == sorted((r["stage"] for r in reports), reverse=True)
    assert reports[-1]["tokens"] == made.position.tokens >= 1280
    assert [report["loss"] for report in reports] == whole[0]


def test_explain_says_what_the_run_does_and_starts_nothing(
    whole: tuple[list[float], Trainer], data: Path, tmp_path: Path
) -> None:
    made = recipe(data)
    assert sum(steps_of(made, number) for number in range(len(made.stages))) == len(whole[0])
    (tmp_path / "recipe.yaml").write_text(dump(made))
    arguments = ["train", str(tmp_path / "recipe.yaml"), "seed=3", "--explain", "--output", str(tmp_path / "run")]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "seed: 3" in result.output
    assert f"test: {whole[1].parameters:,} parameters, 1,280 tokens, precision fp32" in result.output
    assert "1 rank (single): 0.0 GB of weights, gradients and moments for each" in result.output
    for number, (name, tokens, batch) in enumerate((("short", "768", "2 to 8"), ("long", "512", "4"))):
        line = next(line for line in result.output.splitlines() if line.startswith(f"{name} "))
        assert tokens in line
        assert batch in line
        assert f" {steps_of(made, number)} " in line
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("name", "rates"),
    [("mamba-130m", "0 to 0.003 to 1e-05"), ("falcon-mamba-7b", "0.00064 to 2.5e-06"), ("mamba-tiny", "0.004 to 0")],
)
def test_the_explanation_fits_a_narrow_terminal(name: str, rates: str) -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["train", name, "--explain"])
    assert result.exit_code == 0, result.output
    assert rates in result.output, "the first, the highest and the last"
    assert "…" not in result.output


def test_accumulation_does_not_change_the_step(data: Path, tmp_path: Path) -> None:
    """Documents of different lengths leave micro-batches with different numbers of targets."""
    found = []
    for micro_batch in (1, 2, 8):
        values = yaml.safe_load(dump(recipe(data)))
        for stage in values["stages"]:
            stage["micro_batch"] = micro_batch
        made = trainer(recipe(data, {"stages": values["stages"]}), tmp_path / str(micro_batch))
        found.append(finish(made, 8))
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=1e-5)


def test_it_learns(whole: tuple[list[float], Trainer]) -> None:
    losses, made = whole
    assert losses[-1] < losses[0] - 0.2
    measured = made.measure()
    assert measured["held_out/loss"] == pytest.approx(losses[-1], abs=0.5)
    assert measured["held_out/bits_per_byte"] > 0


def test_bad_steps_change_nothing_and_bring_the_checkpoint_back(data: Path, tmp_path: Path) -> None:
    made = trainer(recipe(data, {"optimizer": {"patience": 2, "rewinds": 1}}), tmp_path)
    finish(made, 3)
    made.save()
    made.checkpoints.wait()
    kept = {name: value.clone() for name, value in made.network.state_dict().items()}
    finish(made, 4)
    read = made.position.sequences
    poison = made.network.backbone.embeddings.register_forward_hook(lambda *found: found[2] * math.nan)
    assert made.advance().verdict is Verdict.LEAVE
    assert (made.position.step, made.guard.skipped) == (4, 1)
    assert made.advance().verdict is Verdict.REWIND
    assert (made.position.step, made.guard.rewinds) == (3, 1)
    # It stays where the data is, so that it does not read again what did harm.
    assert made.position.sequences > read
    for name, value in kept.items():
        assert torch.equal(made.network.state_dict()[name], value), name
    with pytest.raises(DivergedError, match="the last checkpoint is intact"):
        finish(made)
    poison.remove()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that is in use queues nothing")
def test_steps_leave_nothing_for_gpus_that_are_not_there(data: Path, tmp_path: Path) -> None:
    run = trainer(recipe(data), tmp_path / "run")
    before = len(torch.cuda._queued_calls)
    finish(run, 3)
    assert len(torch.cuda._queued_calls) == before


def test_a_fork_decays_from_another_runs_checkpoint(data: Path, tmp_path: Path) -> None:
    base = trainer(recipe(data), tmp_path / "base")
    finish(base, 6)
    checkpoints = Checkpoints(tmp_path / "base" / "checkpoints")
    base.checkpoints = checkpoints
    base.save()
    checkpoints.wait()
    changes = {"fork": {"run": str(tmp_path / "base"), "step": 6}, "schedule": {"kind": "linear", "peak": 1e-2}}
    fork = trainer(recipe(data, changes), tmp_path / "fork")
    assert (fork.position, fork.checkpoints.latest()) == (base.position, None)
    report = fork.advance()
    assert report.step == 7
    assert report.values["learning_rate"] < 1e-2


def test_a_fork_has_the_same_beginning(data: Path, tmp_path: Path) -> None:
    made = recipe(data)
    base = trainer(made, tmp_path / "base")
    for step in (6, 12):
        finish(base, step)
        base.save()
    base.checkpoints.wait()
    (tmp_path / "base" / "recipe.yaml").write_text(dump(made))
    assert base.position.stage == 1
    stages = yaml.safe_load(dump(made))["stages"]

    def fork(step: int, **changes: Any) -> Trainer:
        origin = {"run": str(tmp_path / "base"), "step": step}
        return trainer(recipe(data, changes | {"fork": origin}), tmp_path / "fork")

    shorter = [stages[0] | {"tokens": 512}, stages[1]]
    assert fork(6, stages=shorter).position.step == 6, "the stage that is going on may end elsewhere"
    with pytest.raises(ValueError, match=r"its stages\.0\.tokens is 768, here it is 512.*before the fork must be"):
        fork(12, stages=shorter)
    with pytest.raises(ValueError, match=r"its stages\.0\.batch is 8, here it is 16"):
        fork(6, stages=[stages[0] | {"batch": 16}, stages[1]])
    with pytest.raises(ValueError, match=r"its seed is 0, here it is 1"):
        fork(6, seed=1)
    with pytest.raises(ValueError, match=r"its longest context is 32, here it is 64"):
        fork(6, stages=[stages[0], stages[1] | {"context": 64}])


def test_data_of_a_later_stage_is_opened_before_the_first_step(data: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "short", [[[1, 2, 3]]], vocab_size=VOCABULARY)
    found = Metadata.read(tmp_path / "short")
    fingerprint = Metadata.read(data / "tokens").tokenizer_fingerprint
    (tmp_path / "short" / METADATA).write_text(replace(found, tokenizer_fingerprint=fingerprint).to_json())
    stages = yaml.safe_load(dump(recipe(data)))["stages"]
    stages[1]["data"] = {"sources": [{"path": str(tmp_path / "short")}]}
    made = recipe(data, {"stages": stages})
    with pytest.raises(ValueError, match="has 3 tokens on this side of the split, and a sequence needs 33"):
        run(made, tmp_path / "run", Ranks(), Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_another_recipe_in_the_folder_is_refused(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    assert not run(recipe(data), tmp_path / "run", Ranks(), console)
    assert capfd.readouterr().err == "", "transformers' bar is not among ours"
    with pytest.raises(ValueError, match=r"its schedule.peak is 0.01, here it is 0.02.*--restart"):
        run(recipe(data, {"schedule": {"kind": "wsd", "peak": 2e-2, "warmup": 100, "decay": 400}}), tmp_path / "run",
            Ranks(), console)  # fmt: skip
    origin = {"run": str(tmp_path / "other"), "step": 6}
    with pytest.raises(ValueError, match=r"its fork is none, here it is step 6 of .*other.*--restart"):
        run(recipe(data, {"fork": origin}), tmp_path / "run", Ranks(), console)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"checkpoints", "curves.png", "metrics.jsonl", "model", "recipe.yaml", "tensorboard"}


@pytest.mark.parametrize("text", [None, ": bad [", ""], ids=["missing", "damaged", "empty"])
def test_a_run_that_has_lost_its_recipe(text: str | None, data: Path, tmp_path: Path) -> None:
    made = trainer(recipe(data), tmp_path)
    made.save()
    made.checkpoints.wait()
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"(?s)has lost its recipe .*: put it back, or forget the run with --restart"):
        run(recipe(data), tmp_path, Ranks(), Console(quiet=True))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [0]


def test_a_run_that_diverges_before_its_first_checkpoint(data: Path, tmp_path: Path) -> None:
    made = trainer(recipe(data, {"optimizer": {"patience": 2}}), tmp_path)
    made.network.backbone.embeddings.register_forward_hook(lambda *found: found[2] * math.nan)
    with pytest.raises(DivergedError, match=r"step 1: loss nan.*no checkpoint yet"):
        finish(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "{folder}/none"}, "does not exist: name a tokenizer's folder"),
        ({"data": {"sources": [{"path": "{folder}/none"}]}, "tokenizer": "{folder}/none"}, "none does not exist: make"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(
    changes: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    changes = json.loads(json.dumps(changes).replace("{folder}", str(tmp_path)))
    with pytest.raises(ValueError, match=message):
        run(recipe(data, changes), tmp_path / "run", Ranks(), Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_what_is_watched_on_request(data: Path, tmp_path: Path) -> None:
    """A profile of some steps, the layers' norms, held-out loss and samples on their schedules."""
    logging = {"every": 2, "layers": 3, "plot": 4, "profile": [2, 3]}
    evaluation = {"every": 5, "sequences": 4, "prompt": "def", "new_tokens": 3}
    shown = io.StringIO()
    sampled: list[tuple[str, int]] = []

    def sample(model: object, tokenizer: object, prompt: str, tokens: int) -> str:
        sampled.append((prompt, tokens))
        return " text"

    made = recipe(data, {"logging": logging, "evaluation": evaluation})
    assert not run(made, tmp_path, Ranks(), Console(file=shown, force_terminal=True, width=120), sample=sample)
    lines = list(read_metrics(tmp_path / "metrics.jsonl"))
    last = lines[-1]["step"]
    every = {*range(2, last, 2), *range(3, last + 1, 3), last}
    assert [line["step"] for line in lines if "loss" in line] == sorted(every)
    norms = [line for line in lines if "layers/1/state" in line]
    assert [line["step"] for line in norms] == list(range(3, last + 1, 3))
    assert all(line["layers/0/delta"] > 0 and line["layers/1/C"] > 0 for line in norms)
    assert [line["step"] for line in lines if "held_out/loss" in line] == [*range(5, last, 5), last]
    assert [line["sample"] for line in lines if "sample" in line] == ["def text"] * len(sampled)
    assert set(sampled) == {("def", 3)}
    # The bar and its text.
    assert "tokens/s" in shown.getvalue()
    assert f"step {last} · loss" in shown.getvalue()
    events = json.loads((tmp_path / "profile.json").read_text())["traceEvents"]
    steps = [event for event in events if str(event.get("name", "")).startswith("Optimizer.step")]
    assert len(steps) == 2


def test_a_profile_of_a_run_that_goes_on_or_ends(tmp_path: Path) -> None:
    for first, done, path in ((1, [0, 1], "begins"), (3, [4, 5], "goes on"), (9, [4, 5], "not reached")):
        profile = Profile((first, first + 3), tmp_path / path)
        for step in done:
            profile.after(step)
        profile.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begins", "goes on"]


def test_wrong_vocabulary_and_missing_files_are_named(data: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(dump(recipe(data)))
    values["model"]["config"]["vocab_size"] = 100
    with pytest.raises(ValueError, match=r"has 272 tokens, the model's vocabulary 100: set model\.config\.vocab_size"):
        trainer(recipe(data, {"model": values["model"]}), tmp_path)
    with pytest.raises(ValueError, match="mambalm tokenize"):
        trainer(recipe(data, {"data": {"sources": [{"path": str(tmp_path / "none")}]}}), tmp_path)
    with pytest.raises(ValueError, match="does not exist: name a tokenizer's folder"):
        trainer(recipe(data, {"tokenizer": str(tmp_path / "none")}), tmp_path)
