"""Every layer compiles in one graph, with and without a state; what torch.compile gives is what the layer gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mambalm.layers import Attention
from tests.helpers import assert_close, cu_seqlens
from tests.layers.cases import D_MODEL, LAYERS, build, contents, outcome, past, read_whole


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def compiled(layer: nn.Module) -> nn.Module:
    return torch.compile(layer, fullgraph=True, backend="aot_eager")  # type: ignore[return-value]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("continued", [False, True], ids=["fresh", "continued"])
def test_forward_and_backward(name: str, continued: bool) -> None:
    layer = build(name)
    x, state = torch.randn(3, 6, D_MODEL), past(layer) if continued else None
    together = compiled(layer)

    def read(_: nn.Module, x: Tensor, state: object) -> tuple[Tensor, object]:
        return together(x, state, return_state=True)

    assert_close(outcome(layer, x, state, read), outcome(layer, x, state, read_whole))


@pytest.mark.parametrize("name", ["mamba", "falcon", "mamba2"])
def test_packed(name: str) -> None:
    layer = build(name)
    x, state, offsets = torch.randn(1, 7, D_MODEL), past(layer), cu_seqlens([0, 2, 2, 7])
    expected, final = layer(x, state, offsets, return_state=True)
    y, same = compiled(layer)(x, state, offsets, return_state=True)
    assert_close({"y": y} | contents(same), {"y": expected} | contents(final))


def test_decoding_compiles_for_any_length() -> None:
    """Keys of length 0 and 1 are compiled for themselves, then all lengths at once."""
    layer = build("attention")
    assert isinstance(layer, Attention)
    together, state, x = compiled(layer), layer.init_state(2), torch.randn(2, 6, D_MODEL)
    expected = layer(x)
    outputs = []
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3):  # type: ignore[attr-defined]
        for token in x.split(1, dim=1):
            y, state = together(token, state, return_state=True)
            outputs.append(y)
    assert_close({"y": torch.cat(outputs, dim=1)}, {"y": expected})
