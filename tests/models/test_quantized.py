"""bitsandbytes through transformers: what is quantised by default, and that it computes what its weights say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from mambalm.models.adapters import attach_adapter, projections
from mambalm.models.quantized import with_default_skips
from tests.helpers import relative_error
from tests.models.tiny import ATTENTION, FAMILIES, STOCK, VOCABULARY, tokens

pytestmark = pytest.mark.usefixtures("portable")

# bitsandbytes on a CPU wants multiples of 64 inputs and of 32 outputs.
SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 64},
    "falcon_mamba": {"hidden_size": 64, "intermediate_size": 128, "time_step_rank": 64, "state_size": 16},
    "mamba2": {"hidden_size": 64, "num_heads": 32},
    "hybrid": {
        "hidden_size": 64,
        "d_intermediate": 128,
        "ssm_cfg": {"d_state": 4},
        "attn_cfg": ATTENTION | {"head_dim": 16},
    },
}
FOUR_BITS = {"load_in_4bit": True}


def dequantised(quantised: nn.Module, model: nn.Module) -> nn.Module:
    """The model with each quantised weight as bitsandbytes itself reads it back."""
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = model.get_submodule(name).weight
                values = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                weight.copy_(values.reshape(weight.shape))
    return model


def quantised_names(model: nn.Module) -> set[str]:
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_four_bits(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model, ids = family.model(**SIZES[name]), tokens(2, 21)
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**FOUR_BITS)
    quantised = family.ours.from_pretrained(tmp_path, quantization_config=config)
    assert config.llm_int8_skip_modules is None
    assert quantised_names(quantised) == {"in_proj", "out_proj"} | ({"fc1", "fc2"} if name == "hybrid" else set())
    expected = dequantised(quantised, model)(ids).logits
    quantised.save_pretrained(tmp_path / "again")
    found = quantised(ids).logits
    # The CPU kernel multiplies in bfloat16: an error of that size, where bad strides gave 141 %.
    assert relative_error(found, expected) < 2e-2
    assert torch.equal(family.ours.from_pretrained(tmp_path / "again")(ids).logits, found)
    assert quantised.generate(ids, do_sample=True, max_new_tokens=3).shape == (2, 24)


@torch.no_grad()
def test_eight_bits(tmp_path: Path) -> None:
    model, ids = FAMILIES["mamba"].model(**SIZES["mamba"]), tokens(2, 21)
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    quantised = type(model).from_pretrained(tmp_path, quantization_config=config)
    assert quantised_names(quantised) == {"in_proj", "out_proj"}
    assert relative_error(quantised(ids).logits, model(ids).logits) < 2e-2


@torch.no_grad()
def test_a_checkpoint_that_stock_transformers_quantised_whole(tmp_path: Path) -> None:
    """dt_proj and x_proj are 4-bit in it, as in the published 4-bit FalconMamba."""
    family = STOCK["falcon_mamba"]
    model, ids = family.model(**SIZES["falcon_mamba"]), tokens(2, 21)
    model.save_pretrained(tmp_path)
    assert family.stock is not None
    stock = family.stock.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**FOUR_BITS))
    stock.save_pretrained(tmp_path / "quantised")
    quantised = family.ours.from_pretrained(tmp_path / "quantised")
    assert quantised_names(quantised) == {"in_proj", "out_proj", "x_proj", "dt_proj"}
    expected = dequantised(quantised, model)(ids).logits
    assert relative_error(quantised(ids).logits, expected) < 2e-2


@pytest.mark.parametrize("name", SIZES)
def test_adapters_train_on_four_bits(name: str, tmp_path: Path) -> None:
    """QLoRA: every projection has an adapter, quantised or not."""
    family, ids = FAMILIES[name], tokens(2, 9)
    family.model(**SIZES[name]).save_pretrained(tmp_path)
    quantised = family.ours.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**FOUR_BITS))
    adapted, report = attach_adapter(quantised)
    assert list(report.adapted) == projections(family.model(**SIZES[name]))
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_weights_that_bitsandbytes_would_write_wrong_are_not_saved(tmp_path: Path) -> None:
    model = FAMILIES["mamba"].model(**SIZES["mamba"])
    model.save_pretrained(tmp_path)
    quantised = type(model).from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**FOUR_BITS))
    packed = quantised.backbone.layers[1].mixer.in_proj.weight.quant_state
    packed.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"backbone\.layers\.1\.mixer\.in_proj has run on the CPU"):
        quantised.save_pretrained(tmp_path / "again")


def test_a_config_that_names_its_skips_is_taken_as_it_is() -> None:
    for config in (BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"]), object()):
        assert with_default_skips(config) is config


def test_both_snippets_of_the_article(tmp_path: Path) -> None:
    """Huggingface's article on FalconMamba: plain, and with BitsAndBytesConfig; in a process of its own."""
    import subprocess
    import sys

    import mambalm

    FAMILIES["falcon_mamba"].model(**SIZES["falcon_mamba"]).save_pretrained(tmp_path)
    script = f"""
import torch, mambalm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
mambalm.register()
inputs = {{"input_ids": torch.arange(5)[None] % {VOCABULARY}, "attention_mask": torch.ones(1, 5)}}
plain = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype="auto", device_map="auto")
small = AutoModelForCausalLM.from_pretrained(
    {str(tmp_path)!r}, dtype="auto", device_map="auto", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
)
for model in (plain, small):
    assert type(model).__module__ == "mambalm.models.falcon_mamba"
    assert model.generate(**inputs, max_new_tokens=4, do_sample=True).shape == (1, 9)
assert small.get_memory_footprint() < plain.get_memory_footprint()
"""
    environment = {"PYTHONPATH": str(Path(mambalm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
