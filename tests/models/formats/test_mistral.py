"""Codestral Mamba's consolidated layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Mamba2Config

import mambalm
from mambalm.models import Mamba2ForCausalLM
from mambalm.models.formats import CheckpointError
from mambalm.models.loading import convert
from tests.models.formats.checkpoints import assert_same, logits, original_tensors, own

# The published params.json but for the sizes; heads of 64 channels, 8 groups.
PARAMS = {
    "dim": 256,
    "n_layers": 2,
    "vocab_size": 48,
    "n_groups": 8,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 1,
    "tie_embeddings": False,
    "model_type": "mamba",
}


def codestral() -> Mamba2ForCausalLM:
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 48}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, n_groups=8, num_heads=8, head_dim=64, state_size=128)).eval()


def write(folder: Path, model: Mamba2ForCausalLM, params: dict) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    tensors = {f"model.{name}": tensor for name, tensor in original_tensors(model).items()}
    save_file(own(tensors), folder / "consolidated.safetensors")


def test_loads_with_its_groups_and_special_tokens(tmp_path: Path) -> None:
    model = codestral()
    write(tmp_path, model, PARAMS)
    (tmp_path / "tokenizer.model.v3").write_bytes(b"pieces")
    loaded = mambalm.load(tmp_path)
    assert_same(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.config.n_groups, loaded.config.eos_token_id, loaded.config.pad_token_id) == (8, 2, None)


@pytest.mark.parametrize("format", ["transformers", "mamba_ssm"])
def test_is_written_in_other_formats(format: str, tmp_path: Path) -> None:
    model = codestral().to(torch.bfloat16)
    write(tmp_path / "a", model, PARAMS)
    (tmp_path / "a" / "tokenizer.model.v3").write_bytes(b"pieces")
    loaded = mambalm.load(convert(tmp_path / "a", tmp_path / "b", format))
    assert_same(loaded.state_dict(), model.state_dict())
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (1, 2)
    assert (tmp_path / "b" / "tokenizer.model.v3").read_bytes() == b"pieces"


def test_transformers_files_beside_it_are_preferred(tmp_path: Path) -> None:
    first, second = codestral(), codestral()
    write(tmp_path, first, PARAMS)
    second.save_pretrained(tmp_path)
    assert_same(mambalm.load(tmp_path).state_dict(), second.state_dict())
    assert_same(mambalm.load(tmp_path / "consolidated.safetensors").state_dict(), first.state_dict())


@pytest.mark.parametrize(
    ("change", "message"), [({"model_type": "transformer"}, "transformer"), ({"sliding_window": 7}, "sliding_window")]
)
def test_other_models_of_mistrals_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    write(tmp_path, codestral(), PARAMS | change)
    with pytest.raises(CheckpointError, match=message):
        mambalm.load(tmp_path)
