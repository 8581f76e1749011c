"""LoRA on every projection through PEFT, and what PEFT is not asked to give up for it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from mambalm.models import attach_adapter, load_adapter
from mambalm.models.adapters import projections
from mambalm.models.quiet import quieten
from tests.helpers import FLOAT32, relative_error
from tests.models.tiny import FAMILIES, tokens

pytestmark = pytest.mark.usefixtures("portable")

PROJECTIONS = {
    "mamba": ["dt_proj", "in_proj", "out_proj", "x_proj"],
    "falcon_mamba": ["dt_proj", "in_proj", "out_proj", "x_proj"],
    "mamba2": ["in_proj", "out_proj"],
    "hybrid": ["fc1", "fc2", "in_proj", "out_proj"],
}


def lora(**arguments: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | arguments)


def stirred(model: PeftModel) -> PeftModel:
    """Adapters that do something: PEFT starts them at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def merged_by_hand(model: PeftModel) -> dict[str, Tensor]:
    """The base model's weights with each adapter's product added to the weight that it stands beside."""
    weights, scale = {}, 2
    for name, value in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            weights[name.replace(".base_layer", "")] = value.clone()
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            product = module.lora_B["default"].weight @ module.lora_A["default"].weight
            weights[f"{name}.weight"] += scale * product
    return weights


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_every_projection_is_adapted_and_acts(name: str, targets: str | None) -> None:
    model = FAMILIES[name].model()
    assert projections(model) == PROJECTIONS[name]
    adapted, report = attach_adapter(model, lora(target_modules=targets))
    stirred(adapted)
    assert list(report.adapted) == PROJECTIONS[name]
    assert all(len(modules) == 2 for modules in report.adapted.values())
    assert report.trainable == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert f"{report.trainable:,} of {report.total:,}" in str(report)
    # Through a state and a step of one token, and with half of the batch padded.
    ids, plain = tokens(2, 9), FAMILIES[name].model()
    plain.load_state_dict(merged_by_hand(adapted))
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    expected = plain(ids, attention_mask=mask).logits
    found = adapted(input_ids=ids, attention_mask=mask).logits
    assert relative_error(found[mask == 1], expected[mask == 1]) <= FLOAT32
    found = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, plain.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_every_adapter_trains(name: str) -> None:
    adapted, report = attach_adapter(FAMILIES[name].model())
    ids = tokens(4, 12)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=3e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    moved = [n for n, p in adapted.named_parameters() if "lora_B" in n and p.abs().max() > 0]
    assert len(moved) == sum(len(modules) for modules in report.adapted.values())


@pytest.mark.parametrize("name", PROJECTIONS)
def test_saved_adapters_load_again(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model()
    adapted = stirred(attach_adapter(model, lora())[0]).eval()
    adapted.save_pretrained(tmp_path)
    again, report = load_adapter(FAMILIES[name].model(), tmp_path)
    ids = tokens(2, 9)
    assert relative_error(again(input_ids=ids).logits, adapted(input_ids=ids).logits) <= FLOAT32
    assert list(report.adapted) == PROJECTIONS[name]
    assert report.trainable == 0
    both, _ = load_adapter(again, tmp_path, "second", is_trainable=True)
    assert both is again
    both.set_adapter("second")
    assert relative_error(both(input_ids=ids).logits, adapted(input_ids=ids).logits) <= FLOAT32
    with pytest.raises(ValueError, match="'second' is loaded already"):
        load_adapter(both, tmp_path, "second")
    plain = again.merge_and_unload()
    assert relative_error(plain(ids).logits, adapted(input_ids=ids).logits) <= FLOAT32


@pytest.mark.parametrize("target", ["qkv_proj", "conv1d"])
def test_an_adapter_for_other_modules_is_not_half_loaded(target: str, tmp_path: Path) -> None:
    attach_adapter(FAMILIES["mamba"].model(), lora())[0].save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"target_modules": [*config["target_modules"], target]}))
    model = FAMILIES["mamba"].model()
    with pytest.raises(ValueError, match=f"target '{target}'"):
        load_adapter(model, tmp_path)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2"])
def test_plain_peft_keeps_its_error(name: str) -> None:
    refused = pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models")
    with refused:
        get_peft_model(FAMILIES[name].model(), lora(target_modules=["out_proj"]))
    adapted, _ = attach_adapter(FAMILIES[name].model(), lora())
    assert adapted.config.model_type == name
    assert "model_type" not in vars(adapted.config)
    with refused:
        get_peft_model(FAMILIES[name].model(), lora(target_modules=["out_proj"]))


def test_the_check_comes_back_after_an_error(tmp_path: Path) -> None:
    model = FAMILIES["mamba"].model()
    with pytest.raises(ValueError, match="Target modules"):
        attach_adapter(model, lora(target_modules=r"nothing\.like\.this"))
    assert "model_type" not in vars(model.config)
    with pytest.raises(ValueError, match="adapter_config"):
        load_adapter(model, tmp_path)
    assert "model_type" not in vars(model.config)


def test_targets_that_cannot_be_adapted() -> None:
    model = FAMILIES["mamba"].model()
    before = {name for name, _ in model.named_modules()}
    for target, message in (
        ("qkv_proj", "'qkv_proj' matches no module of MambaForCausalLM: it has dt_proj, in_proj, out_proj, x_proj"),
        ("conv1d", "'conv1d' cannot be adapted: the convolution's weight goes into an op"),
        ("lm_head", "'lm_head' cannot be adapted: it is tied"),
    ):
        with pytest.raises(ValueError, match=message):
            attach_adapter(model, lora(target_modules=["in_proj", target]))
    assert {name for name, _ in model.named_modules()} == before
    untied = FAMILIES["falcon_mamba"].model()
    assert list(attach_adapter(untied, lora(target_modules=["lm_head", "in_proj"]))[1].adapted) == [
        "in_proj",
        "lm_head",
    ]


def test_stock_models_are_refused() -> None:
    family = FAMILIES["mamba"]
    with pytest.raises(TypeError, match=r"transformers.*MambaForCausalLM is not a mambalm model"):
        attach_adapter(family.stock_model(family.model()))


def test_the_callers_config_stays_as_it_is() -> None:
    config = lora(target_modules="all-linear")
    attach_adapter(FAMILIES["mamba"].model(), config)
    assert config.target_modules == "all-linear"


def test_the_command_line_hears_no_warning_that_is_not_its_users() -> None:
    """PEFT asks transformers by a name that transformers warns of."""
    with warnings.catch_warnings(action="error"):
        quieten()
        attach_adapter(FAMILIES["mamba"].model(), lora())
