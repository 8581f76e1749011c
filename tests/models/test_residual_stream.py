"""The residual stream between blocks: added late where nobody looks, the same sums where somebody does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mambalm.models import common
from tests.helpers import assert_close
from tests.models.tiny import FAMILIES, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_sees_the_sums(family: str) -> None:
    model = FAMILIES[family].model()
    ids = tokens(2, 7)
    seen: list[Any] = []
    expected = model(ids, use_cache=False).logits
    handle = model.backbone.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    hooked = model(ids, use_cache=False).logits
    handle.remove()
    outputs = model(ids, use_cache=False, output_hidden_states=True)
    assert torch.equal(seen[0], outputs.hidden_states[0])
    for logits in (hooked, outputs.logits):
        assert_close({"logits": logits}, {"logits": expected}, 1e-6)


def test_sharded_blocks_add_late_too(mesh: DeviceMesh) -> None:
    model, ids = FAMILIES["mamba"].model().train(), tokens(2, 7)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for block in model.backbone.layers:
        fully_shard(block, mesh=mesh)
    assert not any(common._is_watched(block) for block in model.backbone.layers)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        assert_close({name: gradient}, {name: expected[name]}, 1e-6)
    handle = model.backbone.layers[0].register_forward_hook(lambda *_: None)
    assert common._is_watched(model.backbone.layers[0])
    handle.remove()
