"""transformers' format: read as stock transformers writes it, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig

import mambalm
from mambalm.models.formats import CheckpointError, io
from mambalm.models.loading import convert
from tests.helpers import relative_error
from tests.models.formats.checkpoints import LAYOUTS, SIZES, TOKENS, assert_same, logits

STOCK = {
    "mamba": lambda: transformers.MambaForCausalLM(MambaConfig(**SIZES)),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        Mamba2Config(**SIZES, head_dim=8, num_heads=8, state_size=8, n_groups=8, chunk_size=4, tie_word_embeddings=True)
    ),
    # As falcon-mamba-7b's: expand says 16, intermediate_size 2 * hidden_size, and the latter counts.
    "falcon_mamba": lambda: transformers.FalconMambaForCausalLM(
        FalconMambaConfig(**SIZES, expand=16, intermediate_size=64, tie_word_embeddings=False)
    ),
}


@pytest.mark.parametrize("family", STOCK)
def test_reads_what_stock_transformers_writes(family: str, tmp_path: Path) -> None:
    stock = STOCK[family]().eval()
    stock.save_pretrained(tmp_path)
    loaded = mambalm.load(tmp_path)
    assert type(loaded).__name__ == type(stock).__name__
    assert type(loaded) is not type(stock)
    assert_same(loaded.state_dict(), stock.state_dict())
    with torch.no_grad():
        assert relative_error(logits(loaded), stock(TOKENS).logits) < 1e-5


@pytest.mark.parametrize("family", STOCK)
def test_stock_transformers_reads_what_is_written(family: str, tmp_path: Path) -> None:
    stock = STOCK[family]().eval()
    stock.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "ours")
    again = type(stock).from_pretrained(tmp_path / "ours")
    assert_same(again.state_dict(), stock.state_dict())
    assert_same(load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "stock/model.safetensors"))
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "stock")]
    assert configs[0] == configs[1]


def test_shards_and_torch_files_are_read(tmp_path: Path) -> None:
    stock = STOCK["falcon_mamba"]()
    stock.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same(mambalm.load(tmp_path / "shards").state_dict(), stock.state_dict())
    stock.config.save_pretrained(tmp_path / "torch")
    torch.save(stock.state_dict(), tmp_path / "torch/pytorch_model.bin")
    assert_same(mambalm.load(tmp_path / "torch").state_dict(), stock.state_dict())


def test_large_checkpoints_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = STOCK["falcon_mamba"]()
    stock.save_pretrained(tmp_path / "a")
    monkeypatch.setattr(io, "SHARD_SIZE", "20KB")
    convert(tmp_path / "a", tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert_same(type(stock).from_pretrained(tmp_path / "b").state_dict(), stock.state_dict())


def test_a_hybrid_is_written_and_read(tmp_path: Path) -> None:
    model = LAYOUTS["mamba2attn"].model()
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    for folder in ("a", "b"):
        assert torch.equal(logits(mambalm.load(tmp_path / folder)), logits(model))


def test_the_embeddings_early_name_is_read(tmp_path: Path) -> None:
    stock = STOCK["mamba"]()
    stock.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(mambalm.load(tmp_path).state_dict(), stock.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama'.*mamba2"),
        ({"hidden_size": None, "d_model": 32}, r"lacks hidden_size.*silently.*remove model_type"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantization_config.*register\(\)"),
        ({"state_size": "many"}, "not a valid MambaConfig: [^\n]*state_size"),
        ({"model_type": ["mamba"]}, r"\['mamba'\].*mamba2"),
        ({"dtype": "float99"}, "float99"),
        ({"dtype": []}, "not a valid MambaConfig"),
        ({"hidden_size": -3}, "no model can be built"),
    ],
)
def test_configurations_that_mislead_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    STOCK["mamba"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(CheckpointError, match=message):
        mambalm.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    STOCK["mamba"]().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "backbone.layers.0.mixer.in_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} is {dtype}, expected .* quantised"):
        mambalm.load(tmp_path)


@pytest.mark.parametrize("change", [{"layer_norm_epsilon": "1e-5"}, {"rms_norm": "yes"}, {"attn_cfg": [1]}], ids=str)
def test_fields_of_a_hybrid_are_checked_as_transformers_checks_its_own(change: dict, tmp_path: Path) -> None:
    LAYOUTS["mamba2attn"].model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"not a valid HybridConfig: .*{next(iter(change))}"):
        mambalm.load(tmp_path)


def test_limits_that_are_none_are_refused(tmp_path: Path) -> None:
    STOCK["mamba2"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"time_step_limit": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no model can be built"):
        mambalm.load(tmp_path)


def test_falcon_mamba_has_no_counterpart_in_mamba_ssm(tmp_path: Path) -> None:
    STOCK["falcon_mamba"]().save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="falcon_mamba"):
        convert(tmp_path / "a", tmp_path / "b", "mamba_ssm")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
