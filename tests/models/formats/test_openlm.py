"""OpenLM's checkpoints: a torch file with wrapped names, the model's JSON beside it, LayerNorms with biases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig

import mambalm
from mambalm.models import HybridConfig, MambaForCausalLM, MambaHybridForCausalLM
from mambalm.models.formats import CheckpointError
from mambalm.models.loading import convert
from tests.models.formats.checkpoints import SIZES, assert_same, logits, original_tensors

JSON = {"d_model": 32, "n_layer": 3, "vocab_size": 48, "seq_len": 2048}


def layer_norm_model() -> MambaHybridForCausalLM:
    model = MambaHybridForCausalLM(HybridConfig(**SIZES, rms_norm=False, residual_in_fp32=False)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    return model


def write(folder: Path, model: torch.nn.Module, prefix: str = "module.model.", **contents: object) -> Path:
    path = folder / "checkpoints" / "epoch_3.pt"
    path.parent.mkdir(parents=True)
    tensors = {f"{prefix}{name}": tensor for name, tensor in original_tensors(model).items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": tensors, **contents}, path)
    torch.save({"optimizer": {}}, path.with_name("optimizer_3.pt"))
    (folder / "params.txt").write_text("lr: 0.0003")
    (folder / "mamba_tiny.json").write_text(json.dumps(JSON))
    return path


@pytest.mark.parametrize("prefix", ["module.model.", "model.", "_orig_mod.module.model.", ""])
def test_layer_norm_models_load(prefix: str, tmp_path: Path) -> None:
    model = layer_norm_model()
    path = write(tmp_path, model, prefix)
    for source in (tmp_path, path):
        loaded = mambalm.load(source)
        assert_same(loaded.state_dict(), model.state_dict())
        assert torch.equal(logits(loaded), logits(model))
        assert not loaded.config.residual_in_fp32


def test_models_with_rms_norm_are_plain(tmp_path: Path) -> None:
    model = MambaForCausalLM(MambaConfig(**SIZES, residual_in_fp32=False)).eval()
    write(tmp_path, model)
    loaded = mambalm.load(tmp_path)
    assert type(loaded) is MambaForCausalLM
    assert torch.equal(logits(loaded), logits(model))


def test_is_written_as_mamba_ssm(tmp_path: Path) -> None:
    model = layer_norm_model()
    write(tmp_path, model)
    convert(tmp_path, tmp_path / "out", "mamba_ssm")
    assert_same(torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True), original_tensors(model))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["rms_norm"], config["residual_in_fp32"], config["vocab_size"]) == (False, False, 48)
    assert torch.equal(logits(mambalm.load(tmp_path / "out")), logits(model))


def test_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    model = MambaHybridForCausalLM(HybridConfig(**SIZES, rms_norm=False, tie_word_embeddings=False)).eval()
    write(tmp_path, model)
    assert_same(mambalm.load(tmp_path).state_dict(), model.state_dict())


def test_the_json_must_fit_the_norms(tmp_path: Path) -> None:
    write(tmp_path, layer_norm_model())
    (tmp_path / "mamba_tiny.json").write_text(json.dumps(JSON | {"rms_norm": True}))
    with pytest.raises(CheckpointError, match=r"rms_norm: true.*has backbone\.norm_f\.bias"):
        mambalm.load(tmp_path)


def test_what_is_ambiguous_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, layer_norm_model())
    (tmp_path / "other.json").write_text(json.dumps(JSON | {"n_layer": 4}))
    with pytest.raises(CheckpointError, match=r"mamba_tiny\.json, other\.json"):
        mambalm.load(tmp_path)
    for file in tmp_path.glob("*.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"epoch_3\.pt needs its model's JSON"):
        mambalm.load(tmp_path)
    path.with_name("epoch_4.pt").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"epoch_3\.pt, epoch_4\.pt.*one file"):
        mambalm.load(tmp_path)


def test_a_torch_file_without_weights_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, layer_norm_model())
    torch.save({"state_dict": {"step": 3}}, path)
    with pytest.raises(CheckpointError, match="state_dict of tensors"):
        mambalm.load(path)
