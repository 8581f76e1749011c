"""A run spread over ranks learns what a run on one does: copies, shards, resumed on another number of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemReader
from transformers import MambaConfig

from mambalm import load
from mambalm.models import MambaForCausalLM
from mambalm.training.checkpoint import Checkpoints
from mambalm.training.distributed import Ranks
from mambalm.training.metrics import read_metrics
from mambalm.training.recipe_files import dump
from tests.training.runs import VOCABULARY, finish, recipe, trainer, write_data
from tests.training.spread import LARGE, SmallRun, network, work

ROOT = Path(__file__).parents[2]


def launch(folder: Path, world: int, *jobs: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Do jobs of `tests.training.spread` on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    arguments = ["-m", "tests.training.spread", str(folder), json.dumps(jobs)]
    # Tensors of the sizes of a test are mapped as large ones are, so that memory goes back when they do.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def found(folder: Path, world: int, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """What the main rank saw of each."""
    process = launch(folder, world, *jobs)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [line for line in process.stdout.splitlines() if line.startswith("FOUND ")]
    return [json.loads(line.removeprefix("FOUND ")) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the run on one rank, which saves after two steps."""
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return work(folder, {"steps": 8, "save_at": 2}, Ranks())


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Up to the order of sums."""
    for name in ("losses", "norms"):
        assert one[name] == pytest.approx(other[name][one["first"] :][: len(one[name])], rel=2e-5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the checkpoints that `compare_initial` reads."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("mamba", "mamba2", "transformer"):
        network(family).save_pretrained(folder / family)
    MambaForCausalLM(MambaConfig(**LARGE)).bfloat16().save_pretrained(folder / "large")
    return folder


PACKED: dict[str, dict[str, Any]] = {
    "FSDP2": {"mode": "fsdp", "compile": True, "checkpointing": "selective"},
    "DDP": {"mode": "ddp", "compile": True, "checkpointing": "full", "family": "transformer"},
}
PAIR: dict[str, dict[str, Any]] = {
    "initial": {"mode": "fsdp", "initial": True},
    "copies": {"mode": "ddp", "steps": 4},
    "v100 ddp": {"mode": "ddp", "steps": 1, "precision": "v100"},
    "v100 fsdp": {"mode": "fsdp", "steps": 1, "precision": "v100"},
    "overflow": {"mode": "fsdp", "steps": 1, "precision": "fp16", "overflow": True},
} | {f"packed {name}": job | {"packed": True, "steps": 3} for name, job in PACKED.items()}


@pytest.fixture(scope="module")
def pair(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two ranks did, one job after the other, which saves starting them anew for each."""
    folder = tmp_path_factory.mktemp("pair")
    jobs = [job | {"folder": str(models if "initial" in job else folder / name)} for name, job in PAIR.items()]
    return dict(zip(PAIR, found(folder, 2, *jobs), strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_no_rank_holds_the_whole_model(world: int, models: Path, request: pytest.FixtureRequest) -> None:
    """What it begins with is the whole model's, bit for bit, drawn or read; memory is that of a part and of a block."""
    seen = request.getfixturevalue("pair")["initial"] if world == 2 else found(models, world, PAIR["initial"])[0]
    assert seen["different"] == []
    # A block is a 24th of it; the rest is what torch makes on the way.
    assert 1 / world <= seen["peak"] < 1 / world + 0.15
    # Parts of the files' pages, half as large, beside their float32 masters.
    assert 1 / world <= seen["peak_of_checkpoint"] < 1.5 / world + 0.1


def test_copies_learn_what_one_does(alone: dict[str, Any], pair: dict[str, dict[str, Any]]) -> None:
    assert len(pair["copies"]["losses"]) == 4
    same(pair["copies"], alone)


def test_a_run_goes_on_sharded_over_more_and_more_ranks(alone: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "step-2", tmp_path / "step-2")
    [two] = found(tmp_path, 2, {"steps": 4, "mode": "fsdp", "checkpointing": "full"})
    [four] = found(tmp_path, 4, {"steps": 6, "mode": "hsdp", "shard_size": 2, "checkpointing": "selective"})
    one = work(tmp_path, {"steps": 8}, Ranks())
    for part, first in ((two, 2), (four, 4), (one, 6)):
        assert (part["first"], len(part["losses"])) == (first, 2)
        same(part, alone)


@pytest.mark.parametrize("name", PACKED)
def test_packed_compiled_and_computed_again(name: str, pair: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    plain = {"steps": 3, "packed": True, "family": PACKED[name].get("family", "mamba")}
    assert len(pair[f"packed {name}"]["losses"]) == 3
    same(pair[f"packed {name}"], work(tmp_path, plain, Ranks()))


def test_adapters_alone_are_learned_and_kept(models: Path, tmp_path: Path) -> None:
    """Begun on one rank, then on shards, then on copies: what it learns, what it saves and what it leaves alone."""
    job = {"start": str(models / "mamba"), "adapter": True, "steps": 6, "save_at": 2}
    alone = work(tmp_path / "alone", job, Ranks())
    shutil.copytree(tmp_path / "alone" / "step-2", tmp_path / "spread" / "step-2")
    spread = [{"mode": "fsdp", "checkpointing": "full", "steps": 4}, {"mode": "ddp", "steps": 6}]
    sharded, copied = found(tmp_path / "spread", 2, *(job | each for each in spread))
    for part, first in ((sharded, 2), (copied, 4)):
        assert (part["first"], len(part["losses"])) == (first, 2)
        same(part, alone)
        assert part["frozen_changed"] == []
    kept = FileSystemReader(tmp_path / "spread" / "step-4").read_metadata().state_dict_metadata
    assert len(kept) > 20
    assert all(".lora_" in name for name in kept if name.startswith("model."))
    assert all(".lora_" in name for name in kept if ".exp_avg" in name)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_gradients_are_summed_in_half_precision_by_the_v100_policy(
    mode: str, alone: dict[str, Any], pair: dict[str, dict[str, Any]]
) -> None:
    """Near the float32 run, but not as near as another order of summation is."""
    norms = pair[f"v100 {mode}"]["norms"]
    assert norms == pytest.approx(alone["norms"][:1], rel=2e-3)
    assert norms != pytest.approx(alone["norms"][:1], rel=1e-7)


def test_the_command_goes_on_over_ranks_where_it_was_in_the_data(tmp_path: Path) -> None:
    """Two stages with a ramp: on one rank for five steps, on two shards until the end, and exported."""
    write_data(tmp_path)
    settled = recipe(tmp_path)
    losses = finish(trainer(settled, tmp_path / "whole"))
    first = trainer(settled, tmp_path / "spread")
    assert finish(first, 5) == losses[:5]
    first.save()
    first.checkpoints.wait()
    for path in (tmp_path / "spread.yaml", tmp_path / "spread" / "recipe.yaml"):
        path.write_text(dump(settled))
    arguments = [str(tmp_path / "spread.yaml"), "parallel.mode=fsdp", "--output", str(tmp_path / "spread")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mambalm"]
    process = subprocess.run(
        [*command, "train", *arguments, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 0, process.stderr[-3000:]
    rows = [row for row in read_metrics(tmp_path / "spread" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(6, len(losses) + 1))
    assert [row["loss"] for row in rows] == pytest.approx(losses[5:], rel=2e-4)
    assert load(tmp_path / "spread" / "model").config.vocab_size == VOCABULARY


def test_an_overflow_on_one_rank_is_skipped_by_all(pair: dict[str, dict[str, Any]]) -> None:
    seen = pair["overflow"]
    assert (seen["changed"], seen["scale"]) == (0, 0.5)


@pytest.mark.parametrize(
    ("job", "message"),
    [({}, "rank 1 fails as the test asks"), ({"kill": True}, "Signal 9")],
    ids=["an error", "kill -9"],
)
def test_a_rank_that_dies_ends_the_run_and_leaves_its_checkpoints(
    job: dict[str, Any], message: str, tmp_path: Path
) -> None:
    process = launch(tmp_path, 2, job | {"steps": 9, "mode": "fsdp", "save_always": True, "die": 2})
    assert process.returncode != 0
    assert message in process.stderr
    run = SmallRun({}, Ranks())
    state = run.state()
    Checkpoints(tmp_path).load(state)
    assert state["progress"] == {"step": 2}
