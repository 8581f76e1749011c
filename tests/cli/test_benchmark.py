"""`mambalm benchmark`: the files that each command writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner, Result

import mambalm_cli

SHORT = {
    "generate": ("--prompt-length", "5", "--genlen", "3", "--repeats", "1", "--batch", "2"),
    "memory": ("--memory-gib", "1.5", "--shortest", "16", "--longest", "32", "--mode", "chunked", "--mode", "parallel"),
    "throughput": ("--tokens", "140", "--steps", "4"),
    "restore": ("--length", "20", "--repeats", "1"),
}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(mambalm_cli.app, ["benchmark", *map(str, arguments)])


def measured(path: Path) -> dict[str, Any]:
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert found["environment"]["commit"]
    return found


SAID = {
    "generate": r"first token after [\d.e+]+ ms \([\d.]+ times the reading alone\), then [\d.e+]+ ms per token",
    "memory": r"chunked: 32 tokens, then stopped by longest asked for; parallel: 32 tokens, then",
    "throughput": r"tokens/s at 128: [\d,]+; all 140 written, at the end [+-][\d.]+% in time and [+-]\d+ MiB of memory",
    "restore": r"saved in [\d.e+]+ ms, restored in [\d.e+]+ ms, 0.\d MiB; the same logits next",
}


@pytest.mark.parametrize("kind", SHORT)
def test_each_command_writes_json_and_a_figure(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "found.json"
    result = call(kind, tiny_checkpoint, *SHORT[kind], "--device", "cpu", "-o", output)
    assert result.exit_code == 0, result.output
    found = measured(output)
    assert found["benchmark"] == kind
    classes = [model["class"] for model in found["models"]]
    assert classes == ["mambalm.MambaForCausalLM", "transformers.LlamaForCausalLM"][: 1 if kind == "restore" else 2]
    assert len({model["vocabulary"] for model in found["models"]}) == 1
    lines = result.stdout.splitlines()
    assert len(lines) == len(classes)
    for model, line in zip(found["models"], lines, strict=True):
        assert re.fullmatch(f"{re.escape(model['name'])}: {SAID[kind]}.*", line)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["found.json", "found.png"]


def test_a_text_is_continued(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    options = ("--prompt", "the quick", "--genlen", "4", "--no-beside", "--device", "cpu", "-o", output)
    assert call("generate", tiny_checkpoint, *options).exit_code == 0
    (model,) = measured(output)["models"]
    assert model["text"]
    assert model["prompt_length"] < 9


@pytest.mark.parametrize("kind", [LlamaForCausalLM, GPTNeoXForCausalLM])
def test_any_model_of_transformers(tmp_path: Path, kind: type) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    kind(kind.config_class(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "model")
    output = tmp_path / "found.json"
    for command in ("throughput", "generate", "memory"):
        result = call(command, tmp_path / "model", *SHORT[command], "--device", "cpu", "-o", output)
        assert result.exit_code == 0, result.output
        assert [model["class"] for model in measured(output)["models"]] == [f"transformers.{kind.__name__}"]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (("--memory-gib", "0.01"), "chunked: 0.01 GiB are too little for 16 tokens"),
        (("--memory-gib", "1", "--seconds", "0"), "chunked: 0 seconds are too little for 16 tokens"),
    ],
)
def test_where_nothing_fits_that_is_said(
    limit: tuple[str, ...], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "found.json"
    options = ("--shortest", "16", "--longest", "32", "--no-beside", "--device", "cpu", "-o", output)
    result = call("memory", tiny_checkpoint, *limit, *options)
    assert result.exit_code == 0, result.output
    assert message in result.stderr
    assert [mode["longest"] for mode in measured(output)["models"][0]["modes"]] == [0, 0, 0]


def test_nothing_to_measure_is_told() -> None:
    for arguments, message in {
        ("generate",): "name a MODEL, or a shape with --random",
        ("generate", "--random", "mamba-3b", "--device", "cpu"): "there is no shape 'mamba-3b'",
        ("generate", "--random", "mamba-130m", "--prompt", "hello"): "--prompt needs a tokenizer",
        ("memory", "no-such-model", "--mode", "sideways"): "there is no mode 'sideways'; choose one of parallel",
        ("generate", "no-such-model", "-o", "no/such/file.json"): "no/such/file.json cannot be written: name a file",
        (
            "generate",
            "no-such-model",
            "-o",
            "a.png",
        ): "a.png is where the figure goes: name the JSON file, such as a.json",
        ("generate", "no-such-model", "-o", "found.json"): "no-such-model does not exist: name a folder",
    }.items():
        result = call(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr
