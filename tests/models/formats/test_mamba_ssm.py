"""mamba_ssm's format: four layouts read, computed with, and written back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Mamba2Config, MambaConfig

import mambalm
from mambalm.models import HybridConfig
from mambalm.models.formats import CheckpointError, mamba_ssm
from mambalm.models.loading import convert
from tests.helpers import relative_error
from tests.models.formats.checkpoints import (
    ATTENTION,
    LAYOUTS,
    RAW,
    SIZES,
    TOKENS,
    assert_same,
    logits,
    original_tensors,
    write_original,
)


@pytest.mark.parametrize("kind", ["bin", "safetensors", "shards"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_as_the_model_built_directly(layout: str, kind: str, tmp_path: Path) -> None:
    direct = LAYOUTS[layout].model()
    write_original(tmp_path, LAYOUTS[layout].raw, original_tensors(direct), kind)
    loaded = mambalm.load(tmp_path)
    assert type(loaded) is type(direct)
    assert not loaded.training
    assert_same(loaded.state_dict(), direct.state_dict())
    assert torch.equal(logits(loaded), logits(direct))
    assert loaded.lm_head.weight.data_ptr() == loaded.backbone.embeddings.weight.data_ptr() or layout == "mamba2"


@pytest.mark.parametrize("via", ["mamba_ssm", "transformers"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_writes_back_every_bit(layout: str, via: str, tmp_path: Path) -> None:
    model = LAYOUTS[layout].model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", ".D", "dt_bias")):
            parameter.data = parameter.data.float()
    tensors = original_tensors(model)
    source = write_original(tmp_path / "source", LAYOUTS[layout].raw, tensors)
    convert(source, tmp_path / "between", via)
    convert(tmp_path / "between", tmp_path / "back", "mamba_ssm")
    written = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert_same(written, tensors)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == mamba_ssm.DEFAULTS | config  # whole, so that no version's defaults matter
    assert mamba_ssm.config_from(config).to_dict() == mamba_ssm.config_from(LAYOUTS[layout].raw).to_dict()
    for key in ("vocab_size", "pad_vocab_size_multiple", "attn_layer_idx", "attn_cfg", "d_intermediate"):
        assert config[key] == (mamba_ssm.DEFAULTS | LAYOUTS[layout].raw)[key], key
    assert torch.equal(logits(mambalm.load(tmp_path / "back")), logits(mambalm.load(source)))


@pytest.mark.parametrize("layout", ["mamba", "mamba2"])
def test_stock_transformers_agrees_on_plain_models(layout: str, tmp_path: Path) -> None:
    source = write_original(tmp_path / "a", LAYOUTS[layout].raw, original_tensors(LAYOUTS[layout].model()))
    family = getattr(transformers, LAYOUTS[layout].family.__name__)
    stock = family.from_pretrained(convert(source, tmp_path / "b"))
    with torch.no_grad():
        assert relative_error(logits(mambalm.load(source)), stock(TOKENS).logits) < 1e-5


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = LAYOUTS["mamba"].model()
    source = write_original(tmp_path / "source", LAYOUTS["mamba"].raw, original_tensors(model))
    written = convert(source, tmp_path / "back", "mamba_ssm")
    tensors = torch.load(written / "pytorch_model.bin", weights_only=True)
    head, embedding = tensors["lm_head.weight"], tensors["backbone.embedding.weight"]
    assert head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()


@pytest.mark.parametrize("kept", ["lm_head.weight", "backbone.embedding.weight"])
def test_either_tensor_of_a_tied_pair_will_do(kept: str, tmp_path: Path) -> None:
    direct = LAYOUTS["mamba"].model()
    tensors = original_tensors(direct)
    pair = {"lm_head.weight", "backbone.embedding.weight"}
    write_original(tmp_path, LAYOUTS["mamba"].raw, {n: t for n, t in tensors.items() if n not in pair - {kept}})
    assert_same(mambalm.load(tmp_path).state_dict(), direct.state_dict())


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    tensors = original_tensors(LAYOUTS["mamba"].model())
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    write_original(tmp_path, LAYOUTS["mamba"].raw, tensors)
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight \(48, 32\) differs from backbone\.embeddings.*tie_embeddings"
    ):
        mambalm.load(tmp_path)


def test_plain_models_become_transformers_configurations() -> None:
    mamba = mamba_ssm.config_from(RAW | {"ssm_cfg": {"dt_rank": 5, "d_conv": 3, "bias": True, "dt_init": "constant"}})
    assert type(mamba) is MambaConfig
    assert (mamba.time_step_rank, mamba.conv_kernel, mamba.use_bias, mamba.vocab_size) == (5, 3, True, 48)
    options = {"layer": "Mamba2", "headdim": 16, "dt_limit": [0.0, 0.5], "chunk_size": 64, "A_init_range": [1, 8]}
    mamba2 = mamba_ssm.config_from(RAW | {"ssm_cfg": options, "residual_in_fp32": False})
    assert type(mamba2) is Mamba2Config
    assert (mamba2.num_heads, mamba2.state_size, mamba2.n_groups, mamba2.chunk_size) == (4, 128, 1, 64)
    assert list(mamba2.time_step_limit) == [0.0, 0.5]
    assert not mamba2.residual_in_fp32


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm": False},
        {"d_intermediate": 64},
        {"ssm_cfg": {"expand": 1.5}},
        {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 32, "headdim": 16}},
        {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}},
        {"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}},
        {"attn_layer_idx": [0], "attn_cfg": ATTENTION},
    ],
)
def test_what_transformers_cannot_say_becomes_a_hybrid(change: dict) -> None:
    raw = RAW | change
    config = mamba_ssm.config_from(raw)
    assert type(config) is HybridConfig
    back = mamba_ssm.config_to(config)
    assert back | raw == back


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ({"d_state": 8, "dt_rank": 7, "use_fast_path": False}, "Mamba1"),
        ({"layer": "Mamba2", "dt_limit": [0.01, 1.0], "conv_init": 0.5, "use_mem_eff_path": False}, "Mamba2"),
    ],
)
def test_every_option_survives(options: dict, layer: str, tmp_path: Path) -> None:
    config = mamba_ssm.config_from(RAW | {"ssm_cfg": options, "fused_add_norm": False})
    config.save_pretrained(tmp_path)
    back = mamba_ssm.config_to(type(config).from_pretrained(tmp_path))
    assert back["ssm_cfg"] == options
    assert back["fused_add_norm"] is False


def test_a_hybrid_of_ones_own_says_what_mamba_ssm_would_take_otherwise() -> None:
    layers = {"ssm_cfg": {"layer": "Mamba2", "headdim": 16}, "attn_layer_idx": [0], "attn_cfg": {"num_heads": 2}}
    raw = mamba_ssm.config_to(HybridConfig(**SIZES, **layers))
    assert raw["ssm_cfg"] == {"layer": "Mamba2", "headdim": 16, "d_state": 64}
    assert raw["attn_cfg"] == {"num_heads": 2, "causal": True}
    assert (raw["vocab_size"], raw["pad_vocab_size_multiple"]) == (48, 8)


def test_a_resized_vocabulary_is_written_as_it_is() -> None:
    config = mamba_ssm.config_from(RAW)
    config.vocab_size = 50
    assert {"vocab_size": 50, "pad_vocab_size_multiple": 1}.items() <= mamba_ssm.config_to(config).items()


def test_special_tokens_are_kept(tmp_path: Path) -> None:
    source = write_original(tmp_path / "a", LAYOUTS["mamba"].raw, original_tensors(LAYOUTS["mamba"].model()))
    assert mambalm.load(source).config.eos_token_id == 0
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 9, "bos_token_id": 3}))
    convert(source, tmp_path / "b", "transformers")
    convert(tmp_path / "b", tmp_path / "c", "mamba_ssm")
    model = mambalm.load(tmp_path / "c")
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id) == (9, 3, None)
    assert model.generation_config.eos_token_id == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_cfg": {}}, "moe_cfg"),
        ({"n_layer": None}, "n_layer"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
        ({"ssm_cfg": {"ngroups": 2}}, "ngroups"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate"),
        ({"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2}}, "causal"),
        ({"attn_layer_idx": [0], "attn_cfg": ATTENTION | {"rotary_emb_interleaved": True}}, "rotary_emb_interleaved"),
        ({"attn_layer_idx": [9], "attn_cfg": ATTENTION}, r"\[9\]"),
        ({"d_model": "32"}, "d_model '32'.*int"),
        ({"attn_layer_idx": 3}, r"attn_layer_idx 3.*list"),
        ({"attn_layer_idx": [0], "attn_cfg": ATTENTION | {"window": 4}}, "attn_cfg has window"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 48}}, "head_dim"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}, "headdim is 0"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": "64"}}, "headdim is '64'"),
        ({"ssm_cfg": {"layer": ["Mamba2"]}}, r"layer is \['Mamba2'\]"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        mamba_ssm.config_from(RAW | change)


def test_sizes_that_build_no_model_are_refused(tmp_path: Path) -> None:
    layout = LAYOUTS["mamba2attn"]
    raw = layout.raw | {"attn_cfg": ATTENTION | {"rotary_emb_dim": 7}}
    write_original(tmp_path, raw, original_tensors(layout.model()))
    with pytest.raises(CheckpointError, match=r"no model can be built.*rotary_emb_dim must be even"):
        mambalm.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MambaConfig(**SIZES, layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
        (MambaConfig(**SIZES, hidden_act="gelu"), "hidden_act"),
        (MambaConfig(**SIZES, intermediate_size=48), "intermediate_size"),
        (MambaConfig(**SIZES, sliding_window=3), "sliding_window"),
        (HybridConfig(**SIZES, layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
        (HybridConfig(**SIZES, ssm_cfg={"d_inner": 48}), "d_inner"),
        (HybridConfig(**SIZES, attn_layer_idx=[0], attn_cfg={"num_heads": 2, "backend": "portable"}), "backend"),
    ],
)
def test_fields_without_a_counterpart_are_refused_by_name(config: MambaConfig, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        mamba_ssm.config_to(config)
