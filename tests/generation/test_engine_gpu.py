"""The captured steps beside the eager ones, on a GPU."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mambalm.diagnostics.verify import HALF_PRECISION_FACTOR
from mambalm.generation import Engine, Sampling, Settings, read, step
from mambalm.models.common import MambalmForCausalLM
from mambalm.ops import use_backend
from tests.helpers import FLOAT32, relative_error
from tests.models.tiny import FAMILIES, WITH_TRANSFORMERPP, lively, tokens

pytestmark = pytest.mark.gpu

LAYERNORM = {"rms_norm": False}
PROMPTS = [tokens(length, seed=length) for length in (3, 1, 9, 4, 17)]


def model_of(family: str, dtype: torch.dtype = torch.float32) -> MambalmForCausalLM:
    return FAMILIES[family].model(num_hidden_layers=3).to("cuda", dtype)


def rows_of(engine: Engine, settings: Settings, **more: object) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in PROMPTS for _ in range(settings.copies)]
    for token in engine.generate(PROMPTS, settings, **more):  # type: ignore[arg-type]
        rows[token.row].append(token.id)
    return rows


@pytest.mark.parametrize("family", WITH_TRANSFORMERPP)
def test_greedy_tokens_are_those_of_generate(family: str) -> None:
    model = lively(family, num_hidden_layers=3).to("cuda")
    engine = Engine(model)
    assert engine.explain() == "captured, fused"
    for prompt, row in zip(PROMPTS, rows_of(engine, Settings(max_new_tokens=20)), strict=True):
        expected = model.generate(prompt[None].cuda(), max_new_tokens=20, do_sample=False)
        assert row == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("batch", [1, 3, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_are_the_models(family: str, dtype: torch.dtype, batch: int) -> None:
    exact = model_of(family).double()
    model = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(model.state_dict())
    ids = tokens(batch, 12).cuda()
    reader, state = Engine(model).reader(model.init_state(batch)), model.init_state(batch)
    truth = exact.init_state(batch)
    for position in range(ids.shape[1]):
        found = reader(ids[:, position])
        rounded, state = step(model, ids[:, position], state)
        logits, truth = step(exact, ids[:, position], truth)
    allowed = FLOAT32 if dtype == torch.float32 else HALF_PRECISION_FACTOR * relative_error(rounded, logits)
    assert relative_error(found, logits) <= allowed
    for own, other in zip(reader.state().layers, truth.layers, strict=True):
        for name in ("ssm", "keys", "values"):
            if (part := getattr(other, name, None)) is not None:
                error = relative_error(getattr(own, name)[:, :12], part[:, :12])
                assert error <= (FLOAT32 if dtype == torch.float32 else 0.02)
    assert reader.state().position.tolist() == [12] * batch


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("family", ["falcon_mamba", "mamba2"])
def test_small_step_sizes_are_the_models(family: str, batch: int) -> None:
    model = model_of(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_bias")):
                parameter -= 12.0
    exact = copy.deepcopy(model).double()
    reader, truth, ids = Engine(model).reader(model.init_state(batch)), exact.init_state(batch), tokens(batch, 5).cuda()
    for position in range(ids.shape[1]):
        found = reader(ids[:, position])
        logits, truth = step(exact, ids[:, position], truth)
    assert relative_error(found, logits) <= FLOAT32
    for own, other in zip(reader.state().layers, truth.layers, strict=True):
        assert relative_error(own.ssm, other.ssm) <= FLOAT32


def test_rows_stop_by_themselves_and_the_rest_moves_to_smaller_graphs() -> None:
    engine = Engine(model_of("falcon_mamba"))
    free = rows_of(engine, Settings(max_new_tokens=30))
    lengths, counts = [3, 30, 7, 4, 12], [0] * len(PROMPTS)
    found: list[list[int]] = [[] for _ in PROMPTS]
    for token in engine.generate(PROMPTS, Settings(max_new_tokens=30), lambda row: counts[row] == lengths[row]):
        counts[token.row] += 1
        found[token.row].append(token.id)
    assert found == [row[:length] for row, length in zip(free, lengths, strict=True)]


@pytest.mark.parametrize("changes", [{}, LAYERNORM])
def test_attention_moves_to_more_room(changes: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambalm.generation.owned_state._ROOM", 8)
    monkeypatch.setattr("mambalm.generation.owned_state._AHEAD", 1)
    model = FAMILIES["hybrid"].model(**changes).to("cuda")
    engine = Engine(model)
    found = rows_of(engine, Settings(max_new_tokens=40))
    assert max(room for _, room, _ in engine.graphs._idle) == 64
    for prompt, row in zip(PROMPTS, found, strict=True):
        expected = model.generate(prompt[None].cuda(), max_new_tokens=40, do_sample=False)
        assert row == expected[0, len(prompt) :].tolist()


def test_draws_are_those_of_the_cpu_and_a_graph_serves_other_settings() -> None:
    model = model_of("mamba")
    engine, plain = Engine(model), Engine(copy.deepcopy(model).cpu())
    for sampling in (
        Sampling(temperature=0.8, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.2, frequency_penalty=0.1),
        Sampling(temperature=1.3, top_k=3, presence_penalty=0.5),
    ):
        settings = Settings(sampling=sampling, max_new_tokens=15, seed=7, copies=2)
        assert rows_of(engine, settings) == rows_of(plain, settings)
    assert sum(map(len, engine.graphs._idle.values())) == 1


def test_two_runs_at_once_do_not_meet() -> None:
    engine = Engine(model_of("mamba"))
    settings = Settings(max_new_tokens=10, sampling=Sampling(temperature=1.0), seed=1)
    alone = [[token.id for token in engine.generate([prompt], settings)] for prompt in PROMPTS[:2]]
    both = zip(*(engine.generate([prompt], settings) for prompt in PROMPTS[:2]), strict=True)
    assert [list(row) for row in zip(*([t.id for t in pair] for pair in both), strict=True)] == alone


def test_logprobs_are_reported_with_their_tokens() -> None:
    engine = Engine(model_of("mamba"))
    for token in engine.generate(PROMPTS, Settings(max_new_tokens=6, logprobs=2)):
        assert token.likeliest[0] == (token.id, token.logprob)
        assert len(token.likeliest) == 2


def test_what_cannot_be_captured_is_stepped_eagerly_and_said() -> None:
    model = model_of("mamba")
    with use_backend("portable"):
        engine = Engine(model)
        assert engine.explain() == "eager (selective_scan runs on its portable backend, whose steps wait for the host)"
        found = rows_of(engine, Settings(max_new_tokens=5))
    assert found == rows_of(Engine(model), Settings(max_new_tokens=5))


@pytest.mark.parametrize("batch", [1, 3])
def test_adapted_projections_are_called_within_the_graph(batch: int) -> None:
    model = model_of("mamba")
    mixer = model.backbone.layers[1].mixer
    mixer.in_proj = torch.nn.Sequential(mixer.in_proj, torch.nn.Identity())
    engine = Engine(model)
    assert engine.explain() == "captured, the model's own forward (a projection is adapted or quantised)"
    reader, state = engine.reader(model.init_state(batch)), model.init_state(batch)
    for position in range(4):
        ids = tokens(batch, 4).cuda()[:, position]
        logits, state = step(model, ids, state)
        assert relative_error(reader(ids), logits) <= FLOAT32


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_changed_in_place_are_seen_by_the_next_run(family: str) -> None:
    model = lively(family).to("cuda", torch.bfloat16)
    engine = Engine(model)
    rows_of(engine, Settings(max_new_tokens=3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 0.5 if name.endswith(("A_log", "D", "dt_bias")) else 1.1
    assert rows_of(engine, Settings(max_new_tokens=12)) == rows_of(Engine(model), Settings(max_new_tokens=12))


def test_logits_that_become_no_numbers_are_told() -> None:
    model = lively("falcon_mamba").to("cuda")
    engine, settings = Engine(model), Settings(max_new_tokens=6)
    expected = rows_of(engine, settings)
    logits, state = read(model, PROMPTS)
    state.layers[1].ssm[1] = torch.nan
    for first in (logits.index_fill(0, torch.tensor([1], device="cuda"), torch.nan), logits):
        with pytest.raises(ValueError, match="the logits of row 2 are NaN or infinite"):
            list(engine.go_on(first, state, engine.chooser(len(PROMPTS), settings), settings))
    assert rows_of(engine, settings) == expected


def test_threads_share_an_engine_while_graphs_are_captured() -> None:
    """Prompts of one length, so that chunk graphs are shared as well."""
    model = lively("mamba2").to("cuda")

    def work(engine: Engine, seed: int) -> list[int]:
        rows = [tokens(40, seed=seed + row) for row in range(1 + seed % 5)]
        way = Sampling(temperature=1.0, top_k=5 * (seed % 2))
        settings = Settings(sampling=way, seed=seed, max_new_tokens=12, end_tokens=frozenset({3, 7}))
        return [token.id for token in engine.generate(rows, settings)]

    plain = Engine(model)
    alone = [work(plain, seed) for seed in range(24)]
    shared = Engine(model)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: work(shared, seed), range(24))) == alone


def test_memory_does_not_grow_with_the_kinds_of_runs() -> None:
    """24 kinds, of which 16 graphs are kept."""
    engine = Engine(lively("mamba").to("cuda"))

    def run(first: int) -> int:
        for number in range(first, first + 48):
            prompts = [tokens(5 + number % 8, seed=number)] * (1 + number % 2)
            list(engine.generate(prompts, Settings(max_new_tokens=3, logprobs=number % 24)))
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = run(0)
    assert run(48) <= before
