"""Which prompts graphs read; what they read is tested on a GPU."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from mambalm.generation import chunk_graphs, read
from mambalm.layers.state import State
from mambalm.ops import use_backend
from tests.models.tiny import FAMILIES, tokens


class Eager:
    """In a graph's place: the model itself."""

    def __init__(self, model: Any, ids: torch.Tensor, pool: Any) -> None:
        self.model = model

    def __call__(self, ids: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        output = self.model(ids, cache_params=state, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], output.cache_params


def test_the_second_time_and_only_what_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """35 tokens in chunks of 16 leave 3; rows of two lengths are padded, which no graph does."""
    monkeypatch.setattr(chunk_graphs, "_Chunk", Eager)
    monkeypatch.setattr("mambalm.generation.reading.chosen_chunk_size", lambda model: 16)
    model = FAMILIES["mamba"].model(num_hidden_layers=1)
    graphs = chunk_graphs.ChunkGraphs(model, None)
    for _ in range(3):
        expected, _ = read(model, [tokens(35)])
        found, state = read(model, [tokens(35)], graphs=graphs)
        assert torch.equal(found, expected)
        assert state.position.tolist() == [35]
        read(model, [tokens(5), tokens(8)], graphs=graphs)
    assert list(graphs._graphs) == [(1, 3)]


def test_the_least_recent_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_graphs, "_Chunk", Eager)
    monkeypatch.setattr(chunk_graphs, "_MOST_GRAPHS", 2)
    model = FAMILIES["mamba"].model(num_hidden_layers=1)
    graphs = chunk_graphs.ChunkGraphs(model, None)
    for length in (4, 4, 5, 5, 4, 6, 6):
        graphs.read(tokens(1, length), model.init_state(1))
    assert [length for _, length in graphs._graphs] == [4, 6]
    assert graphs.read(tokens(1, 7), model.init_state(1)) is None
    with use_backend("portable"):
        assert graphs.read(tokens(1, 6), model.init_state(1)) is None


def test_attention_is_read_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_graphs, "_Chunk", Eager)
    model = FAMILIES["hybrid"].model()
    graphs = chunk_graphs.ChunkGraphs(model, None)
    assert [graphs.read(tokens(1, 4), model.init_state(1)) for _ in range(3)] == [None] * 3


class Slow:
    """In a graph's place: its memory, and the time that it takes."""

    def __init__(self, model: Any, ids: torch.Tensor, pool: Any) -> None:
        self.ids = ids.clone()

    def __call__(self, ids: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        self.ids.copy_(ids)
        time.sleep(0.002)
        return self.ids.clone(), state


def test_threads_do_not_meet_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_graphs, "_Chunk", Slow)
    model = FAMILIES["mamba"].model(num_hidden_layers=1)
    graphs, state = chunk_graphs.ChunkGraphs(model, None), model.init_state(1)
    graphs.read(tokens(1, 5), state)

    def work(seed: int) -> bool:
        ids = tokens(1, 5, seed=seed)
        return all(torch.equal(graphs.read(ids, state)[0], ids) for _ in range(10))  # type: ignore[index]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
