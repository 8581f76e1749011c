"""The decode step of a CPU beside the model itself, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mambalm import State
from mambalm.generation import Sampling, Settings, decode
from mambalm.generation.cpu_step import CPUStep, refusal
from mambalm.models.common import MambalmForCausalLM
from mambalm.ops import use_backend
from mambalm.quantization.model import quantize_model
from tests.helpers import FLOAT32, relative_error
from tests.models.tiny import FAMILIES, STOCK, tokens

# Sizes at which every projection is a job; at the others dt_proj is called as a module.
WIDE: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 64, "time_step_rank": 16, "state_size": 8},
    "falcon_mamba": {"hidden_size": 64, "intermediate_size": 160, "time_step_rank": 16, "state_size": 8},
    "mamba2": {"hidden_size": 64, "num_heads": 32, "time_step_limit": (0.01, 0.2)},
}


def walk(model: MambalmForCausalLM, step: CPUStep, state: State, length: int) -> tuple[float, State]:
    """The largest relative error of the logits over a walk, and the model's own state after it."""
    worst = 0.0
    for column in tokens(length, state.batch_size, seed=3):
        output = model(column[:, None], cache_params=state, use_cache=True)
        state = output.cache_params
        worst = max(worst, relative_error(step(column), output.logits[:, 0]))
    return worst, state


def state_error(found: State, expected: State) -> float:
    assert torch.equal(found.position, expected.position)
    pairs = [(a, b) for a, b in zip(found.layers, expected.layers, strict=True)]
    assert all(a.conv.dtype == b.conv.dtype for a, b in pairs)
    return max(max(relative_error(a.ssm, b.ssm), relative_error(a.conv, b.conv)) for a, b in pairs)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize(("wide", "rows"), [(False, 1), (True, 1), (False, 3), (True, 4)])
@torch.no_grad()
def test_the_step_is_the_model(name: str, wide: bool, rows: int) -> None:
    model = FAMILIES[name].model(**WIDE[name] if wide else {})
    assert refusal(model) is None
    before = model(tokens(rows, 7), cache_params=model.init_state(rows), use_cache=True).cache_params
    kept = before.clone()
    step = CPUStep(model, before)
    error, expected = walk(model, step, before, 9)
    assert error < FLOAT32
    assert state_error(step.state(), expected) < FLOAT32
    assert state_error(before, kept) == 0


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_a_state_that_was_given_out_stays_as_it_is(name: str) -> None:
    model = FAMILIES[name].model()
    step = CPUStep(model, model.init_state(2))
    step(tokens(2))
    state = step.state()
    kept = state.clone()
    step(tokens(2, seed=2))
    step.reorder(torch.tensor([1, 0]))
    assert state_error(state, kept) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_no_worse_than_the_model(dtype: torch.dtype) -> None:
    exact = FAMILIES["mamba"].model(**WIDE["mamba"])
    rounded = FAMILIES["mamba"].model(**WIDE["mamba"]).to(dtype)
    step, state, truth = CPUStep(rounded, rounded.init_state(1)), rounded.init_state(1), exact.init_state(1)
    for token in tokens(9, 1):
        output = rounded(token[None], cache_params=state, use_cache=True)
        right = exact(token[None], cache_params=truth, use_cache=True)
        state, truth = output.cache_params, right.cache_params
        error = relative_error(step(token), right.logits[0])
        assert error <= 2 * relative_error(output.logits[0], right.logits[0])
    assert state_error(step.state(), state) < 3e-2


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_quantised_models(name: str, quantization: str) -> None:
    model = quantize_model(FAMILIES[name].model(**WIDE[name]), quantization)
    error, _ = walk(model, CPUStep(model, model.init_state(3)), model.init_state(3), 5)
    assert error < 1e-3  # both round x to 16 bits, but not the same x


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_rows_change_places(name: str) -> None:
    model, order = FAMILIES[name].model(**WIDE[name]), torch.tensor([2, 0, 0])
    before = model(tokens(3, 5), cache_params=model.init_state(3), use_cache=True).cache_params
    step = CPUStep(model, before)
    step.reorder(order)
    assert state_error(step.state(), before.index(order)) == 0
    error, _ = walk(model, step, before.index(order), 3)
    assert error < FLOAT32


class Doubled(nn.Module):
    """A Linear with something added that no kernel knows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + 0.1 * self.linear(x).tanh()


@torch.no_grad()
def test_an_unknown_projection_is_called() -> None:
    model = FAMILIES["mamba"].model(**WIDE["mamba"])
    for name in ("in_proj", "out_proj"):
        mixer: Any = model.backbone.layers[1].mixer  # type: ignore[union-attr, index]
        setattr(mixer, name, Doubled(getattr(mixer, name)))
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    error, _ = walk(model, CPUStep(model, model.init_state(1)), model.init_state(1), 4)
    assert error < FLOAT32
    assert len(calls) == 8


def test_what_has_no_step_says_why() -> None:
    assert "more than" in str(refusal(FAMILIES["hybrid"].model()))
    assert "float64" in str(refusal(FAMILIES["mamba"].model().double()))
    model = FAMILIES["mamba"].model()
    with use_backend("portable"):
        assert "backend" in str(refusal(model))
    for module in (model, model.backbone.layers[0]):  # type: ignore[index]
        handle = module.register_forward_hook(lambda *_: None)
        assert "hooks" in str(refusal(model))
        handle.remove()
    assert refusal(model) is None
    gated = FAMILIES["mamba2"].model()
    gated.backbone.layers[1].mixer.norm.register_forward_hook(lambda *_: None)  # type: ignore[union-attr, index]
    assert "hooks" in str(refusal(gated))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_engine_gives_the_same_text(tiny_model: MambalmForCausalLM, rows: int) -> None:
    ends = frozenset(range(0, tiny_model.config.vocab_size, 7))  # some rows stop before the others
    prompt, settings = (
        [torch.tensor([5, 9, 13])] * rows,
        Settings(max_new_tokens=12, sampling=Sampling(temperature=30.0), seed=0, end_tokens=ends),
    )
    found = list(decode(tiny_model, prompt, settings))
    with use_backend("portable"):
        assert found == list(decode(tiny_model, prompt, settings))
    assert len({token for _, token in found}) > 1
