"""Weight decay by name, for every parameter of every family."""

from __future__ import annotations

import pytest
import torch
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig

from mambalm.models.falcon_mamba import FalconMambaForCausalLM
from mambalm.models.mamba import MambaForCausalLM
from mambalm.models.mamba2 import Mamba2ForCausalLM
from mambalm.training.optimizer import adamw, decays, parameter_groups, set_learning_rate

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
MAMBA = {"mixer.in_proj.weight", "mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.out_proj.weight"}
MAMBA2 = {"mixer.in_proj.weight", "mixer.out_proj.weight"}


HEADS = {"num_heads": 4, "head_dim": 8, "n_groups": 1}


def small_mamba(**options: object) -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(**SIZES | options))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (small_mamba(tie_word_embeddings=True, use_bias=True), MAMBA),
        (small_mamba(tie_word_embeddings=False), MAMBA | {"lm_head.weight"}),
        (FalconMambaForCausalLM(FalconMambaConfig(**SIZES, tie_word_embeddings=True)), MAMBA),
        (
            Mamba2ForCausalLM(Mamba2Config(**SIZES, **HEADS, tie_word_embeddings=True)),
            MAMBA2,
        ),
    ],
)
def test_only_matrices_decay(model: torch.nn.Module, expected: set[str]) -> None:
    decayed, others = parameter_groups(model.named_parameters(), 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)].removeprefix("backbone.layers.0.") for parameter in decayed["params"]}
    assert found == expected
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize(
    "name", ["a.A_log", "a.D", "a.dt_bias", "dt_proj.bias", "norm_f.weight", "a.norm2.weight", "b.embedding.weight"]
)
def test_these_never_decay(name: str) -> None:
    assert not decays(name)


def test_frozen_parameters_are_left_out() -> None:
    model = small_mamba()
    model.backbone.layers[0].mixer.A_log.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), 0.1)
    count = sum(len(group["params"]) for group in groups)
    assert count == len(list(model.parameters())) - 1


def test_decay_shrinks_matrices_and_leaves_a_log() -> None:
    model = small_mamba()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = adamw(model, weight_decay=0.5)
    set_learning_rate(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if decays(name) else 1.0), msg=name)
