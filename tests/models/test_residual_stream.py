"""The residual stream between blocks: added late where nobody looks, the same sums where somebody does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
