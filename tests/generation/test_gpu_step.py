"""The fused step of a GPU in Triton's interpreter, beside the model's own forward, and which models have one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mambalm.generation import gpu_step, step
from mambalm.ops import triton_steps
from tests.helpers import FLOAT32, relative_error
from tests.models.tiny import FAMILIES, tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted; test_engine_gpu.py has the real thing")


def steps_agree(
    family: str, batch: int, monkeypatch: pytest.MonkeyPatch, tiles: dict[str, int], **changes: Any
) -> None:
    monkeypatch.setattr(triton_steps, "Tiles", lambda: TILES(**tiles))
    model = FAMILIES[family].model(**changes)
    assert gpu_step.refusal(model) is None
    ids, state, owned = tokens(batch, 3), model.init_state(batch), model.init_state(batch)
    fused = gpu_step.FusedStep(model, owned, [gpu_step.weights(block) for block in model.backbone.layers])
    logits = torch.full((batch, model.config.vocab_size), torch.nan)
    with torch.no_grad():
        for position in range(ids.shape[1]):
            expected, state = step(model, ids[:, position], state)
            fused(ids[:, position], logits)
            assert relative_error(logits, expected) <= FLOAT32
    for found, layer in zip(owned.layers, state.layers, strict=True):
        assert relative_error(found.ssm, layer.ssm) <= FLOAT32
        assert relative_error(found.conv, layer.conv) <= FLOAT32
    assert torch.equal(owned.position, state.position)


TILES = triton_steps.Tiles
# Small, so that there are several of each, with ragged ends.
SMALL = {"enter_rows": 4, "leave_rows": 2, "split_rows": 4, "head_rows": 4, "columns": 16, "scan_channels": 16}
SMALL |= {"batch_channels": 16, "conv_channels": 16}


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_fused_step_is_the_models(family: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_agree(family, batch, monkeypatch, SMALL)


@pytest.mark.parametrize("batch", [1, 4])
def test_odd_sizes_and_biases(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 18, "intermediate_size": 37, "state_size": 5, "time_step_rank": 3, "conv_kernel": 3}
    steps_agree("mamba", batch, monkeypatch, SMALL, **sizes, use_bias=True, use_conv_bias=False)


def test_as_it_is_cut_for_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in (1, 2):
        steps_agree("falcon_mamba", batch, monkeypatch, {})


def test_models_without_a_fused_step_say_why() -> None:
    assert "more than a norm and a Mamba layer" in str(gpu_step.refusal(FAMILIES["mamba2"].model()))
    model: Any = FAMILIES["mamba"].model()
    model.backbone.layers[1].mixer.x_proj.register_forward_hook(lambda *_: None)
    assert gpu_step.refusal(model) == "a module has hooks"
    adapted: Any = FAMILIES["mamba"].model()
    adapted.backbone.layers[0].mixer.in_proj = nn.Sequential(adapted.backbone.layers[0].mixer.in_proj)
    assert gpu_step.refusal(adapted) == "a projection is adapted or quantised"
    assert "too coarse" in str(gpu_step.refusal(FAMILIES["mamba"].model().double()))
