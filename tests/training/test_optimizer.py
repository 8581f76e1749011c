"""Weight decay by name, for every parameter of every family."""

from __future__ import annotations

import pytest
import torch
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig

from mambalm.models.falcon_mamba import FalconMambaForCausalLM
from mambalm.models.mamba import MambaForCausalLM
from mambalm.models.mamba2 import Mamba2ForCausalLM
from mambalm.training.optimizer import adamw, decays, parameter_groups, set_learning_rate, step_in_backward

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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_in_the_backward_is_the_step_after_it(checkpointing: bool) -> None:
    tokens = torch.randint(32, (2, 9))
    torch.manual_seed(0)
    one = small_mamba(tie_word_embeddings=True).train()
    other = small_mamba(tie_word_embeddings=True).train()
    other.load_state_dict(one.state_dict())
    if checkpointing:
        other.gradient_checkpointing_enable()
    after, within = adamw(one), adamw(other)
    handles = step_in_backward(within)
    for rate in (0.1, 0.03, 0.01):
        set_learning_rate(after, rate)
        set_learning_rate(within, rate)
        one(tokens, labels=tokens).loss.backward()
        after.step()
        after.zero_grad()
        other(tokens, labels=tokens).loss.backward()
        assert all(parameter.grad is None for parameter in other.parameters())
    for (name, expected), found in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected), name
        assert torch.equal(within.state[found]["exp_avg_sq"], after.state[expected]["exp_avg_sq"]), name
    for handle in handles:
        handle.remove()
    other(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in other.parameters())


def test_gradients_never_lie_in_memory_together() -> None:
    model = small_mamba(tie_word_embeddings=False)
    seen = []
    step_in_backward(adamw(model))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: seen.append(sum(other.grad is not None for other in model.parameters()))
        )
    tokens = torch.randint(32, (1, 5))
    model(tokens, labels=tokens).loss.backward()
    assert seen == [0] * len(list(model.parameters()))
