"""What a run writes down, and takes back after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
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
