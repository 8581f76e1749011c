"""What a run writes down, and takes back after a kill."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Mamba2Config, MambaConfig, PreTrainedTokenizerFast

from mambalm.data.tokenizer import train_tokenizer
from mambalm.models.common import MambalmForCausalLM
from mambalm.models.mamba import MambaForCausalLM
from mambalm.models.mamba2 import Mamba2ForCausalLM
from mambalm.training.curve import plot_run, plot_runs
from mambalm.training.held_out import token_bytes
from mambalm.training.layer_norms import layer_norms
from mambalm.training.metrics import MetricsLog, peak_flops, read_metrics


def test_later_steps_are_taken_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step, "stage": "a", "nothing": None})
    log.write(3, {"loss": math.nan})
    log.close()
    path = tmp_path / "metrics.jsonl"
    assert list(read_metrics(path))[-1] == {"step": 3, "loss": "nan"}
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 3]
    log = MetricsLog(tmp_path, 2)
    log.write(3, {"loss": 5.0})
    log.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 0.5, 5.0]
    assert list((tmp_path / "tensorboard").iterdir())


class FakeWandb(ModuleType):
    """Keeps what a run tells wandb."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self.ended = 0

    def init(self, **arguments: Any) -> SimpleNamespace:
        self.begun.append(arguments)
        return SimpleNamespace(log=self.lines.append, finish=self._finish, define_metric=lambda *_, **__: None)

    def _finish(self) -> None:
        self.ended += 1


def test_wandb_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder has one run there: gone on with after a kill, whatever other folders' runs are called."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for folder, step in ((tmp_path / "a", 0), (tmp_path / "a", 2), (tmp_path / "b", 0)):
        folder.mkdir(exist_ok=True)
        log = MetricsLog(folder, step, wandb="project", name="mine", config={"seed": 0})
        for number in (step + 1, step + 2, step + 3):
            log.write(number, {"loss": 1.0, "stage": "a"})
        log.close()
    first, again, other = (begun["id"] for begun in fake.begun)
    assert first == again != other
    assert all(begun["resume"] == "allow" and begun["project"] == "project" for begun in fake.begun)
    # Step 3, which is written again after the kill, is not lost.
    assert [line["step"] for line in fake.lines] == [1, 2, 3, 3, 4, 5, 1, 2, 3]
    assert fake.lines[0] == {"step": 1, "loss": 1.0}
    assert fake.ended == 3

    def locked(**_: object) -> None:
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(fake, "init", locked)
    monkeypatch.setattr(fake, "Error", RuntimeError, raising=False)
    with pytest.raises(ValueError, match="wandb=project does not open: No API key configured"):
        MetricsLog(tmp_path / "a", 0, wandb="project")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"logging\.wandb needs wandb: pip install 'mambalm\[train\]'"):
        MetricsLog(tmp_path / "a", 0, wandb="project")


def test_tensorboard_holds_every_number(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step, "layers/0/delta": 0.5, "stage": "a"})
    log.close()
    time.sleep(1.1)  # files are read by name, in which the second is what tells a later run from an earlier
    log = MetricsLog(tmp_path, 1)
    log.write(2, {"loss": 7.0})
    log.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(read.Tags()["scalars"]) == ["layers/0/delta", "loss"]
    # Of a run that went on from step 1, what was written behind it before does not count.
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 1.0), (2, 7.0)]


def test_curves(tmp_path: Path) -> None:
    plot_run(tmp_path / "metrics.jsonl", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 5):
        log.write(step, {"loss": 1.0 / step, "learning_rate": 0.1, "gradient_norm": 1.0, "tokens": step})
    log.write(4, {"held_out/loss": 0.5, "tokens": 4})
    log.close()
    plot_run(log.path, tmp_path / "curves.png")
    plot_runs({"one": log.path, "two": log.path}, {}, tmp_path / "losses.png")
    plot_runs({"one": log.path}, {"xz": 2.0}, tmp_path / "both.png")
    for name in ("curves", "losses", "both"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_peaks_of_devices() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("a toaster") is None


def models() -> list[MambalmForCausalLM]:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    return [
        MambaForCausalLM(MambaConfig(**sizes)),
        Mamba2ForCausalLM(Mamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=2)),
    ]


@pytest.mark.parametrize("model", models(), ids=["mamba", "mamba2"])
def test_layer_norms_are_those_of_what_the_scan_receives(
    model: MambalmForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the arguments that the op itself was called with."""
    name = "selective_scan" if isinstance(model, MambaForCausalLM) else "ssd"
    module = __import__(f"mambalm.layers.{'mamba' if name == 'selective_scan' else 'mamba2'}", fromlist=[name])
    op, calls = getattr(module, name), []

    def record(*args: torch.Tensor, **kwargs: object) -> object:
        calls.append((args, kwargs, result := op(*args, **kwargs)))
        return result

    monkeypatch.setattr(module, name, record)
    found = layer_norms(model.eval(), torch.randint(32, (2, 9)))
    assert set(found) == {f"layers/{i}/{what}" for i in (0, 1) for what in ("delta", "B", "C", "state")}
    for index, (args, _, result) in enumerate(calls):
        bias = args[7].float()
        delta = torch.nn.functional.softplus(args[1].float() + bias)
        wanted = {"delta": delta, "B": args[3], "C": args[4], "state": result[1]}
        for what, tensor in wanted.items():
            assert found[f"layers/{index}/{what}"] == pytest.approx(tensor.float().square().mean().sqrt().item()), what


def test_bytes_of_tokens_are_those_of_the_text() -> None:
    text = "naïve 日本 def f(x):\n    return x\n"
    tokenizer: PreTrainedTokenizerFast = train_tokenizer([text * 3], 300)
    counts = token_bytes(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert int(counts[ids].sum()) == len(text.encode())
    assert counts[tokenizer.eos_token_id] == 0
