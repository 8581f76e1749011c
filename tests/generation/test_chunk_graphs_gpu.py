"""Short prompts by captured graphs, on a GPU: the tokens, logits and states of an eager reading."""

from __future__ import annotations

import pytest
import torch

from mambalm.generation import Engine, Settings, read
from mambalm.generation import chunk_graphs as module
from mambalm.layers.state import State
from tests.models.tiny import FAMILIES, tokens

pytestmark = pytest.mark.gpu

RECURRENT = [name for name in FAMILIES if "hybrid" not in name]


def assert_equal(found: tuple[torch.Tensor, State], expected: tuple[torch.Tensor, State]) -> None:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].position, expected[1].position)
    for ours, theirs in zip(found[1].layers, expected[1].layers, strict=True):
        assert torch.equal(ours.ssm, theirs.ssm)  # type: ignore[union-attr]
        assert torch.equal(ours.conv, theirs.conv)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", RECURRENT)
def test_as_read_eagerly(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes come twice and more, with states that go on; what was returned is not written again."""
    monkeypatch.setattr(module, "_MOST_GRAPHS", 2)
    model = FAMILIES[family].model(num_hidden_layers=3).to("cuda", dtype)
    engine = Engine(model)
    chunks = engine.chunks
    assert chunks is not None
    kept = []
    for turn, (rows, length) in enumerate([(1, 40), (1, 40), (2, 9), (1, 40), (2, 9), (1, 7), (1, 7), (1, 40), (2, 9)]):
        prompts = list(tokens(rows, length, seed=turn).cuda())
        state = kept[0][1][1].index([0] * rows) if turn % 2 else None
        kept.append((read(model, prompts, state, graphs=chunks), read(model, prompts, state)))
    assert list(chunks._graphs) == [(1, 40), (2, 9)]
    for found, expected in kept:
        assert_equal(found, expected)


def test_the_engine_reads_by_them() -> None:
    """The hybrids' attention layers keep them from it."""
    for family in FAMILIES:
        engine = Engine(FAMILIES[family].model(num_hidden_layers=3).to("cuda"))
        texts = [[token.id for token in engine.generate([tokens(40)], Settings(max_new_tokens=9))] for _ in range(3)]
        assert texts[0] == texts[1] == texts[2]
        assert engine.chunks is not None
        assert len(engine.chunks._graphs) == (family in RECURRENT)
