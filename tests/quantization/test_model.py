"""`mambalm.load(quantization=...)`: what is quantised, and what that does to a model's predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mambalm
from mambalm.quantization.linear import QuantizedLinear
from mambalm.quantization.model import quantize_model
from tests.helpers import relative_error
from tests.models.tiny import FAMILIES, tokens

# Relative errors of the logits of two-layer random models, which are harder on few bits than trained ones.
ALLOWED = {"int8": 0.03, "int4": 0.3}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@torch.no_grad()
def test_logits_stay_near_and_only_the_projections_change(name: str, quantization: str, tmp_path: Path) -> None:
    model, ids = FAMILIES[name].model(), tokens(2, 21)
    model.save_pretrained(tmp_path)
    quantized = mambalm.load(tmp_path, quantization=quantization)
    assert relative_error(quantized(ids).logits, model(ids).logits) < ALLOWED[quantization]
    bits = {
        module_name.rpartition(".")[2]: module.bits
        for module_name, module in quantized.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    few = {"in_proj", "out_proj", "fc1", "fc2"}
    assert {"in_proj", "out_proj", "lm_head"} <= bits.keys() <= few | {"x_proj", "lm_head"}
    assert {bits[key] for key in bits.keys() & few} == {8 if quantization == "int8" else 4}
    assert bits["lm_head"] == 8
    kept = {key: tensor for key, tensor in quantized.state_dict().items() if key in model.state_dict()}
    assert "backbone.embeddings.weight" in kept
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in kept.items())


def negative_log_likelihood(model: nn.Module, ids: Tensor) -> float:
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten()).item()


def test_what_a_trained_model_predicts_stays(tmp_path: Path) -> None:
    """A model that learnt a text loses little of it: the loss rises by less than 1 % in 8 bits, 10 % in 4."""
    model = FAMILIES["mamba"].model(hidden_size=64)
    ids = torch.arange(240).reshape(4, 60) ** 2 // 7 % 48
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        exact = negative_log_likelihood(model.eval(), ids)
        assert exact < 2.5 < negative_log_likelihood(FAMILIES["mamba"].model(hidden_size=64), ids)
        losses = {q: negative_log_likelihood(mambalm.load(tmp_path, quantization=q), ids) for q in ALLOWED}
    assert losses["int8"] < exact + 0.01
    assert losses["int4"] < exact + 0.1


def test_a_packed_model_is_not_saved(tmp_path: Path) -> None:
    model = quantize_model(FAMILIES["mamba"].model(), "int4")
    with pytest.raises(ValueError, match=r"in_proj is packed in 4 bits.*quantise when loading"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_not_available_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'int3' is not available: choose 'int8' or 'int4'.*from_pretrained"):
        mambalm.load(tmp_path, quantization="int3")
    with pytest.raises(ValueError, match=r"for a CPU, not for cuda"):
        mambalm.load(tmp_path, quantization="int4", device="cuda")
    model = FAMILIES["mamba"].model()
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[0, 0] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.in_proj cannot be quantised: .*not finite"):
        quantize_model(model, "int8")
