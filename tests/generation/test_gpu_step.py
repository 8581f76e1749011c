"""The fused step of a GPU in Triton's interpreter, beside the model's own forward, and which models have one."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambalm.generation import gpu_step, read, step, steps
from mambalm.generation.owned_state import OwnedState
from mambalm.ops import triton_steps
from tests.helpers import FLOAT32, relative_error
from tests.models.tiny import ATTENTION, FAMILIES, tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted; test_engine_gpu.py has the real thing")


def steps_agree(
    family: str,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
    tiles: dict[str, int],
    step_bias: float = 0.0,
    **changes: Any,
) -> None:
    """Three steps from a state on, whose rows have read different numbers of tokens, beside the model in float64."""
    monkeypatch.setattr(triton_steps, "Tiles", lambda: TILES(**tiles))
    model = FAMILIES[family].model(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_bias")):
                parameter += step_bias
    assert gpu_step.refusal(model) is None
    exact, owned = copy.deepcopy(model).double(), OwnedState(model, batch, room=7, fused=True)
    fused = gpu_step.FusedStep(model, owned, [gpu_step.weights(block) for block in model.backbone.layers])
    prompts = [tokens(1 + row % 3, seed=row) for row in range(batch)]
    owned.load(read(model, prompts)[1])
    ids, (_, state) = tokens(batch, 3), read(exact, prompts)
    logits = torch.full((batch, model.config.vocab_size), torch.nan)
    with torch.no_grad():
        for position in range(ids.shape[1]):
            expected, state = step(exact, ids[:, position], state)
            fused(ids[:, position], logits)
            owned.longest += 1
            assert relative_error(logits, expected) <= FLOAT32
    found = owned.value(torch.arange(batch))
    for own, layer in zip(found.layers, state.layers, strict=True):
        for name in ("ssm", "conv", "keys", "values"):
            if (part := getattr(layer, name, None)) is not None:
                length = getattr(own, name).shape[1]
                assert relative_error(getattr(own, name), part[:, :length]) <= FLOAT32
                assert getattr(own, name).is_contiguous()
    assert torch.equal(found.position, state.position)


TILES = triton_steps.Tiles
# Small, so that there are several of each, with ragged ends.
SMALL = {"enter_rows": 4, "leave_rows": 2, "split_rows": 4, "head_rows": 4, "columns": 16, "scan_channels": 16}
SMALL |= {"batch_channels": 16, "conv_channels": 16, "head_cells": 8}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["falcon_mamba", "mamba2"])
@pytest.mark.parametrize("bias", [-12.0, 30.0])
def test_step_sizes_small_and_large_are_the_models(
    family: str, batch: int, bias: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log(1 + exp(x)) would lose the small ones, by which a state remembers long."""
    steps_agree(family, batch, monkeypatch, SMALL, bias, num_hidden_layers=1)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_step_is_the_models(family: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_agree(family, batch, monkeypatch, SMALL)


@pytest.mark.parametrize("batch", [1, 4])
def test_odd_sizes_and_biases(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 18, "intermediate_size": 37, "state_size": 5, "time_step_rank": 3, "conv_kernel": 3}
    steps_agree("mamba", batch, monkeypatch, SMALL, **sizes, use_bias=True, use_conv_bias=False)


ODD_HEADS: dict[str, Any] = {"hidden_size": 21, "num_heads": 6, "head_dim": 7, "state_size": 3, "n_groups": 1}
LIMITED: dict[str, Any] = {"time_step_limit": (0.02, 0.3), "use_bias": True, "use_conv_bias": False, "conv_kernel": 3}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [ODD_HEADS, LIMITED, ODD_HEADS | LIMITED])
def test_odd_heads_groups_and_limits(batch: int, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    steps_agree("mamba2", batch, monkeypatch, SMALL, **sizes)


@pytest.mark.parametrize("batch", [1, 3])
def test_hybrids_of_other_kinds(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mamba1 = {"layer": "Mamba1", "d_state": 5}
    steps_agree("hybrid", batch, monkeypatch, SMALL, ssm_cfg=mamba1, d_intermediate=0, residual_in_fp32=False)
    steps_agree("hybrid", batch, monkeypatch, SMALL, attn_layer_idx=[0, 1])
    plain = {"layer": "Mamba2", "d_state": 4, "headdim": 8, "rmsnorm": False, "D_has_hdim": True, "bias": True}
    wide = ATTENTION | {"mlp_dim": 20, "qkv_proj_bias": True, "out_proj_bias": True}
    steps_agree("hybrid", batch, monkeypatch, SMALL, ssm_cfg=plain, attn_cfg=wide, num_hidden_layers=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_it_is_cut_for_an_h200(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in (1, 2):
        steps_agree(family, batch, monkeypatch, {})


def test_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    steps_agree("hybrid", 64, monkeypatch, {})
    few_heads = {"num_heads": 2, "head_dim": 32, "n_groups": 2, "num_hidden_layers": 1}
    steps_agree("mamba2", 64, monkeypatch, {}, **few_heads)


class Products:
    """Stands for `few_rows.gluon`, where there is no GPU: its sums are in up to three shares."""

    takes = staticmethod(lambda weight: True)
    cut_of = staticmethod(lambda weight, most=8, shared=0: SimpleNamespace(shares=min(most, 3, weight.shape[1])))

    @staticmethod
    def project(
        x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, chosen: SimpleNamespace, options: dict[str, Any]
    ) -> None:
        """Products in the shares of y, if it has some."""
        if y.ndim == 2:
            y.copy_(nn.functional.linear(x, weight, bias))
            return
        for share, part, columns in zip(y, x.tensor_split(len(y), 1), weight.tensor_split(len(y), 1), strict=True):
            share.copy_(part @ columns.t())


@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_our_own_come_in_shares(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_steps, "_own_products", lambda *where: Products)
    steps_agree(family, 3, monkeypatch, SMALL)


def test_products_of_our_own_with_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_steps, "_own_products", lambda *where: Products)
    sizes = {"hidden_size": 18, "intermediate_size": 37, "state_size": 5, "time_step_rank": 3, "conv_kernel": 3}
    steps_agree("mamba", 2, monkeypatch, SMALL, **sizes, use_bias=True, use_conv_bias=False)


def test_columns_follow_the_widths() -> None:
    tiles = TILES()
    assert tiles.columns_of({2560, 5120}) == 512
    assert tiles.columns_of({4096, 8192}) == 1024
    assert tiles.columns_of({768, 1536}) == 512
    assert tiles.columns_of({96, 5120}) == 128


def test_models_without_a_fused_step_say_why() -> None:
    assert gpu_step.refusal(FAMILIES["hybrid"].model(rms_norm=False)) == (
        "a module has hooks, or the final norm is no RMSNorm"
    )
    inside = {"layer": "Mamba2", "d_state": 4, "headdim": 8, "d_ssm": 16}
    assert gpu_step.refusal(FAMILIES["hybrid"].model(ssm_cfg=inside)) == "a Mamba-2 layer has an MLP inside"
    model: Any = FAMILIES["mamba"].model()
    model.backbone.layers[1].mixer.x_proj.register_forward_hook(lambda *_: None)
    assert gpu_step.refusal(model) == "a module has hooks"
    adapted: Any = FAMILIES["mamba"].model()
    adapted.backbone.layers[0].mixer.in_proj = nn.Sequential(adapted.backbone.layers[0].mixer.in_proj)
    assert gpu_step.refusal(adapted) == "a projection is adapted or quantised"
    assert "too coarse" in str(gpu_step.refusal(FAMILIES["mamba"].model().double()))


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_parameters_changed_in_place_are_seen_by_the_next_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(steps, "Captured", lambda model, size, room, plan, weights, pool: weights)
    model = FAMILIES[family].model(num_hidden_layers=1)
    graphs = steps.Graphs(model, fused=True)
    blocks: Any = graphs.take(1, None)
    owned = OwnedState(model, 1, room=7, fused=True)
    fused, before = gpu_step.FusedStep(model, owned, blocks), owned.value(torch.arange(1))
    ids, logits = tokens(1, 1)[:, 0], torch.empty(1, model.config.vocab_size)
    computed = []
    monkeypatch.setattr(gpu_step, "renew", lambda *given, renew=gpu_step.renew: (computed.append(1), renew(*given)))
    for changed in ("A_log", ".D", "dt_bias", "nothing", "in_proj.weight", ""):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(changed):
                    parameter += 0.3 * torch.randn_like(parameter)
            computed.clear()
            assert graphs.take(1, None) is blocks
            assert computed or changed in ("dt_bias", "nothing", "in_proj.weight")
            assert changed != "nothing" or not computed
            owned.load(before)
            fused(ids, logits)
        expected, _ = step(model, ids, before)
        assert relative_error(logits, expected) <= FLOAT32
