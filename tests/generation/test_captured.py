"""The engine's captured runs with graphs that run their steps on the CPU: rows, room and what moves between graphs."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mambalm.generation import Engine, Sampling, Session, Settings, engine, owned_state, read, runs, step, steps
from mambalm.generation.owned_state import OwnedState
from mambalm.models.common import MambalmForCausalLM
from tests.generation.broken_off import ERRORS, break_off
from tests.helpers import FLOAT32, relative_error
from tests.models.tiny import FAMILIES, WITH_TRANSFORMERPP, lively, tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_engine_gpu.py has the real thing")

PROMPTS = [tokens(length, seed=length) for length in (3, 1, 9)]


class Event:
    """Of a device that has always done everything."""

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engine, steps):
        monkeypatch.setattr(module, "not_captured", lambda model: None)
    monkeypatch.setattr(engine.gpu_step, "refusal", lambda model: "this is a test of what is around the step")
    monkeypatch.setattr(runs, "_pinned", torch.clone)
    monkeypatch.setattr(engine.cpu_step, "refusal", lambda model: "this is a test of graphs")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)

    def capture(captured: Any, device: object, pool: object) -> SimpleNamespace:
        captured._once()  # leaves garbage behind, as a capture does
        return SimpleNamespace(replay=torch.no_grad()(captured._once))

    monkeypatch.setattr(steps.Captured, "_capture", capture)


def rows_of(model: MambalmForCausalLM, settings: Settings, **more: Any) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(len(PROMPTS) * settings.copies)]
    for token in Engine(model).generate(PROMPTS, settings, **more):
        rows[token.row].append(token.id)
    return rows


@pytest.mark.parametrize("room", [4, 1024])
@pytest.mark.parametrize("family", WITH_TRANSFORMERPP)
def test_greedy_tokens_are_those_of_generate(family: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned_state, "_ROOM", room)
    monkeypatch.setattr(owned_state, "_AHEAD", 1)
    model = lively(family)
    for prompt, row in zip(PROMPTS, rows_of(model, Settings(max_new_tokens=12)), strict=True):
        expected = model.generate(prompt[None], max_new_tokens=12, do_sample=False)
        assert row == expected[0, len(prompt) :].tolist()
        assert len(set(row)) > 2


def test_first_tokens_wait_for_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one hold the rows that stopped at them."""
    taken: list[int] = []
    take = steps.Graphs.take
    monkeypatch.setattr(steps.Graphs, "take", lambda self, rows, *more: taken.append(rows) or take(self, rows, *more))
    one = Engine(lively("mamba"))
    coming = one.generate(PROMPTS, Settings(max_new_tokens=9), lambda row: row == 1)
    assert [next(coming).row for _ in PROMPTS] == [0, 1, 2]
    assert taken == []
    assert [next(coming).row for _ in range(4)] == [0, 2, 0, 2]
    assert taken == [2]
    assert len(list(one.generate(PROMPTS, Settings(max_new_tokens=1)))) == len(PROMPTS)
    assert taken == [2]


def test_many_rows_begin_with_less_room() -> None:
    assert [owned_state.room_for(rows, 32) for rows in (1, 16, 32, 64, 128)] == [1024, 1024, 512, 256, 256]
    assert [owned_state.room_for(rows, 1024) for rows in (1, 32, 64)] == [2048, 2048, 2048]
    assert owned_state.room_for(64, 256) == 512


def test_rows_that_stop_leave_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned_state, "_ROOM", 8)
    monkeypatch.setattr(owned_state, "_AHEAD", 1)
    model = lively("hybrid")
    way = Sampling(temperature=3.0, top_k=20, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.9)
    settings = Settings(max_new_tokens=30, sampling=way, seed=3)
    free = rows_of(model, settings)
    lengths, counts = [4, 30, 17], [0] * len(PROMPTS)
    found: list[list[int]] = [[] for _ in PROMPTS]
    one = Engine(model)
    for token in one.generate(PROMPTS, settings, lambda row: counts[row] == lengths[row]):
        counts[token.row] += 1
        found[token.row].append(token.id)
    assert found == [row[:length] for row, length in zip(free, lengths, strict=True)]
    assert {(size, room) for size, room, _ in one.graphs._idle} == {(4, 16), (2, 16), (2, 32), (1, 32)}


@pytest.mark.parametrize("family", ["mamba", "hybrid"])
def test_draws_are_those_of_eager_steps(family: str) -> None:
    model = FAMILIES[family].model()
    sampling = Sampling(temperature=0.9, top_k=9, repetition_penalty=1.2, frequency_penalty=0.1)
    settings = Settings(sampling=sampling, max_new_tokens=9, seed=7, copies=2)
    found = rows_of(model, settings)
    eager = Engine(model)
    eager.graphs = None
    expected: list[list[int]] = [[] for _ in found]
    for token in eager.generate(PROMPTS, settings):
        expected[token.row].append(token.id)
    assert found == expected


@pytest.mark.parametrize("family", ["mamba2", "hybrid"])
def test_a_reader_reorders_and_finds_room(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned_state, "_ROOM", 8)
    monkeypatch.setattr(owned_state, "_AHEAD", 1)
    model = FAMILIES[family].model()
    _, state = read(model, PROMPTS)
    reader = Engine(model).reader(state)
    ids, order = tokens(len(PROMPTS), 12), torch.tensor([2, 0, 2])
    for position in range(ids.shape[1]):
        expected, state = step(model, ids[:, position], state)
        assert relative_error(reader(ids[:, position]), expected) <= FLOAT32
        if position == 4:
            state = state.reorder(order)
            reader.reorder(order)
    own = reader.state()
    assert torch.equal(own.position, state.position)
    longer, _ = step(model, ids[:, 0], own)
    assert relative_error(longer, step(model, ids[:, 0], state)[0]) <= FLOAT32


def test_what_is_owned_is_no_part_of_what_is_given_out() -> None:
    model = FAMILIES["hybrid"].model()
    _, state = read(model, PROMPTS)
    owned = OwnedState(model, 4, room=16)
    owned.load(state)
    assert not owned.is_full
    kept = owned.value(torch.arange(3))
    before = kept.clone()
    out = torch.zeros(4, model.config.vocab_size)
    with torch.no_grad():
        for _ in range(20):  # a row that is not in use writes past its room, and nobody notices
            steps.GenericStep(model, owned)(torch.zeros(4, dtype=torch.long), out)
            owned.longest += 1
    assert owned.is_full
    for one, other in zip(kept.layers, before.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("error", ERRORS)
def test_what_was_broken_off_leaves_nothing_behind(error: type[BaseException] | None) -> None:
    one = Engine(lively("hybrid"))
    settings = Settings(max_new_tokens=6, sampling=Sampling(temperature=1.0, presence_penalty=0.5), seed=1)
    expected = list(one.generate(PROMPTS, settings))
    graphs = sum(map(len, one.graphs._idle.values()))  # type: ignore[union-attr]

    break_off(one, PROMPTS, settings, error)
    assert list(one.generate(PROMPTS, settings)) == expected
    assert sum(map(len, one.graphs._idle.values())) == graphs  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["mamba2", "hybrid"])
def test_rows_that_stop_at_their_first_token_leave_the_others_as_they_are(family: str) -> None:
    """Before a graph is loaded."""
    model = lively(family)
    way = Sampling(temperature=3.0, top_k=20, repetition_penalty=1.5, frequency_penalty=0.9)
    settings = Settings(max_new_tokens=8, sampling=way, seed=3)
    free, found = rows_of(model, settings), [[] for _ in PROMPTS]  # type: tuple[list[list[int]], list[list[int]]]
    for token in Engine(model).generate(PROMPTS, settings, lambda row: row == 0):
        found[token.row].append(token.id)
    assert found == [free[0][:1], *free[1:]]


def test_interrupted_while_it_moves_no_graph_is_given_back_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs would then share its memory."""
    one, give_back, given, asked = Engine(lively("mamba2")), steps.Graphs.give_back, [], itertools.count()

    def interrupted(graphs: steps.Graphs, captured: steps.Captured, plan: Any) -> None:
        give_back(graphs, captured, plan)
        given.append(captured)
        if len(given) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(steps.Graphs, "give_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(one.generate(PROMPTS, Settings(max_new_tokens=9), lambda row: row < 2 and next(asked) > 4))
    assert len(given) == len(set(map(id, given))) == 2


def test_logits_that_become_no_numbers_are_told() -> None:
    model = lively("mamba2")
    one, settings = Engine(model), Settings(max_new_tokens=6)
    logits, state = read(model, PROMPTS)
    for bad in (logits.index_fill(0, torch.tensor([1]), torch.nan), logits):
        if bad is logits:
            state.layers[1].ssm[1] = torch.nan  # type: ignore[union-attr]
        found = one.go_on(bad, state, one.chooser(3, settings), settings)
        heard = [next(found).row for _ in range(4 if bad is logits else 1)]
        assert heard == [0, 1, 2, 0][: len(heard)]
        with pytest.raises(ValueError, match="the logits of row 2 are NaN or infinite"):
            next(found)
    assert rows_of(model, settings) == rows_of(lively("mamba2"), settings)


def test_so_many_graphs_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_MOST_IDLE", 3)
    one = Engine(FAMILIES["mamba"].model())
    one.chunks = None  # of graphs that cannot be captured here
    for count, logprobs in ((1, None), (1, 1), (2, None), (1, None), (1, 2), (2, None), (1, None), (2, 5)):
        settings = Settings(max_new_tokens=2, logprobs=logprobs)
        list(one.generate(PROMPTS[:count], settings))
    assert one.graphs is not None
    kept = [(size, plan.logprobs) for size, _, plan in one.graphs._idle if plan is not None]
    assert kept == [(2, None), (1, None), (2, 5)]


def test_there_is_no_step_behind_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    one, replays = Engine(lively("mamba2")), []
    replay = steps.Captured.replay
    monkeypatch.setattr(steps.Captured, "replay", lambda self: (replays.append(1), replay(self)))
    assert len(list(one.generate(PROMPTS[:1], Settings(max_new_tokens=5)))) == 5
    assert len(replays) == 4


def test_a_session_keeps_logits_of_its_own() -> None:
    session = Session(lively("mamba2"))
    session.read(PROMPTS[2].tolist())
    list(session.write(Settings(max_new_tokens=3)))
    assert session.snapshot.logits is not None
    before = session.snapshot.logits.clone()
    list(session.fork().write(Settings(max_new_tokens=3)))
    assert torch.equal(session.snapshot.logits, before)
