"""`mambalm convert`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mambalm
from mambalm_cli import app
from tests.models.formats.checkpoints import LAYOUTS, assert_same, original_tensors, write_original


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_original(tmp_path / "source", LAYOUTS["mamba"].raw, original_tensors(LAYOUTS["mamba"].model()))


def test_converts_there_and_back(source: Path, tmp_path: Path) -> None:
    there = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "a")])
    assert there.exit_code == 0
    assert there.stdout.strip() == f"wrote {tmp_path / 'a'} (transformers)"
    back = CliRunner().invoke(app, ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "mamba_ssm"])
    assert back.exit_code == 0
    original, written = (torch.load(f / "pytorch_model.bin", weights_only=True) for f in (source, tmp_path / "b"))
    assert_same(written, original)


def test_casts_and_overwrites_on_request(source: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(source), str(tmp_path / "a"), "--dtype", "bfloat16"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "is not empty" in refused.stderr
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert mambalm.load(tmp_path / "a").lm_head.weight.dtype == torch.bfloat16


def test_says_what_is_wrong(source: Path, tmp_path: Path) -> None:
    weights = source / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "a")])
    assert result.exit_code == 2
    assert "pytorch_model.bin cannot be read: it is truncated" in result.stderr
    assert not (tmp_path / "a").exists()
