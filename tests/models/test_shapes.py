"""The shapes of published models, and the Transformers beside them."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from mambalm.models.common import MambalmForCausalLM
from mambalm.models.shapes import SHAPES, random_model, shape, similar_transformer

# The published checkpoints', counted by hand from their cards.
PARAMETERS = {"mamba-130m": 129_135_360, "mamba-2.8b": 2_768_345_600, "falcon-mamba-7b": 7_272_665_088}


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name", ["mamba-130m", "mamba2-130m", "mamba-2.8b", "mamba-7b-rw", "falcon-mamba-7b", "mamba2attn-2.7b"]
)
def test_sizes(name: str) -> None:
    model = random_model(shape(name), torch.bfloat16, "meta")
    assert isinstance(model, MambalmForCausalLM)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    count = parameters(model)
    assert PARAMETERS.get(name, count) == count
    said = name.removeprefix("falcon-").split("-")[1]
    assert count / {"m": 1e6, "b": 1e9}[said[-1]] == pytest.approx(float(said[:-1]), rel=0.05)
    other = random_model(similar_transformer(model.config, count), torch.bfloat16, "meta")
    assert isinstance(other, LlamaForCausalLM)
    assert parameters(other) == pytest.approx(count, rel=0.03)
    assert other.config.vocab_size == model.config.vocab_size


def test_values_are_those_of_the_initialisation() -> None:
    config = shape("mamba-130m")
    config.num_hidden_layers, config.vocab_size = 1, 64
    torch.manual_seed(0)
    model = random_model(config, torch.bfloat16, "cpu")
    mixer = model.backbone.layers[0].mixer
    assert torch.equal(mixer.A_log[0].float(), torch.arange(1, 17).log().bfloat16().float())
    assert 0 < mixer.in_proj.weight.std() < 0.1
    assert not model.training
    assert type(random_model(config, torch.float32, "cpu", transformers=True)).__module__.startswith("transformers")


def test_an_unknown_name_is_refused() -> None:
    assert len(SHAPES) == 13
    with pytest.raises(ValueError, match="there is no shape 'mamba-3b'; choose one of mamba-130m"):
        shape("mamba-3b")
