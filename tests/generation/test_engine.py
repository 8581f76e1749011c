"""The engine beside transformers' `generate` and beside reading in one piece."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from mambalm.generation import Engine, Sampling, Session, Settings, decode, end_tokens, read, step
from tests.generation.broken_off import ERRORS, break_off
from tests.helpers import FLOAT32, relative_error
from tests.models.tiny import FAMILIES, WITH_TRANSFORMERPP, lively
from tests.models.tiny import tokens as random_tokens

PROMPTS = [torch.tensor(ids) for ids in ([5, 9, 13], [7], [11, 3, 8, 2, 250, 17, 33, 4, 99])]

PROMPTS_48 = [random_tokens(length, seed=length) for length in (3, 1, 9)]


def continuations(model: PreTrainedModel, prompts: list[torch.Tensor], settings: Settings) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for row, token in decode(model, prompts, settings):
        rows[row].append(token)
    return rows


def test_the_end_tokens_are_those_of_the_generation_configuration() -> None:
    model = FAMILIES["mamba"].model()
    model.config.eos_token_id = 4
    model.generation_config.eos_token_id = [3, 5]
    assert end_tokens(model) == {3, 5}
    model.generation_config.eos_token_id = None
    assert end_tokens(model) == {4}
    model.config.eos_token_id = None
    assert end_tokens(model) == frozenset()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("family", WITH_TRANSFORMERPP)
def test_greedy_tokens_of_every_family_are_those_of_generate(family: str, penalty: float) -> None:
    """A repetition penalty counts the prompt's tokens too, as transformers' does."""
    model = lively(family)
    prompts = [random_tokens(length, seed=length) for length in (3, 1, 9)]
    # The stock class, where transformers has one, is nothing of ours.
    stock = WITH_TRANSFORMERPP[family].stock
    other = model if stock is None else WITH_TRANSFORMERPP[family].stock_model(model)
    settings = Settings(max_new_tokens=10, sampling=Sampling(repetition_penalty=penalty))
    for prompt, row in zip(prompts, continuations(model, prompts, settings), strict=True):
        for one in (model, other):
            expected = one.generate(prompt[None], max_new_tokens=10, do_sample=False, repetition_penalty=penalty)
            assert row == expected[0, len(prompt) :].tolist()
        assert len(set(row)) > 2


@pytest.mark.parametrize("chunk_size", [3, 8])
@pytest.mark.parametrize("family", WITH_TRANSFORMERPP)
def test_a_batch_in_chunks_is_each_row_at_once(family: str, chunk_size: int) -> None:
    model = lively(family)
    prompts = [random_tokens(length, seed=length) for length in (13, 1, 20)]
    logits, state = read(model, prompts, chunk_size=chunk_size)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            output = model(prompt[None], cache_params=model.init_state(1), use_cache=True)
        assert relative_error(logits[row], output.logits[0, -1]) <= FLOAT32
        for found, expected in zip(state.index(row).layers, output.cache_params.layers, strict=True):
            for name in ("conv", "ssm", "keys", "values"):
                if (part := getattr(expected, name, None)) is not None:
                    own = getattr(found, name)
                    own = own[:, : part.shape[1]] if name in ("keys", "values") else own
                    assert relative_error(own, part) <= FLOAT32
    alone = [continuations(model, [prompt], Settings(max_new_tokens=8))[0] for prompt in prompts]
    assert continuations(model, prompts, Settings(max_new_tokens=8)) == alone


def test_greedy_tokens_are_those_of_generate(tiny_model: PreTrainedModel) -> None:
    settings = Settings(max_new_tokens=12, end_tokens=end_tokens(tiny_model))
    for prompt, tokens in zip(PROMPTS, continuations(tiny_model, PROMPTS, settings), strict=True):
        expected = tiny_model.generate(prompt[None], max_new_tokens=12, do_sample=False)
        assert tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_token_ids_of_any_integers(tiny_model: PreTrainedModel, dtype: torch.dtype) -> None:
    settings = Settings(max_new_tokens=6, sampling=Sampling(repetition_penalty=1.3))
    expected = continuations(tiny_model, PROMPTS, settings)
    assert continuations(tiny_model, [prompt.to(dtype) for prompt in PROMPTS], settings) == expected


def test_each_row_stops_by_itself(tiny_model: PreTrainedModel) -> None:
    free = continuations(tiny_model, PROMPTS, Settings(max_new_tokens=8))
    # The third token of the first row ends whichever row comes to it.
    end = free[0][2]
    stopped = continuations(tiny_model, PROMPTS, Settings(max_new_tokens=8, end_tokens=frozenset({end})))
    for tokens, whole in zip(stopped, free, strict=True):
        assert tokens == (whole[: whole.index(end) + 1] if end in whole else whole)
    assert len({len(tokens) for tokens in stopped}) > 1


def test_the_rows_that_go_on_keep_their_own_states(tiny_model: PreTrainedModel) -> None:
    positions = []
    handle = tiny_model.backbone.register_forward_pre_hook(
        lambda module, arguments, options: positions.append(options["cache_params"].position.tolist()), with_kwargs=True
    )
    counts = [0, 0, 0]
    for row, _ in decode(tiny_model, PROMPTS, Settings(max_new_tokens=5), lambda row: counts[row] == [4, 1, 5][row]):
        counts[row] += 1
    handle.remove()
    # The prompts have 3, 1 and 9 tokens; the second row stops first, then the first.
    assert positions == [[0, 0, 0], [3, 9], [4, 10], [5, 11], [12]]
    assert counts == [4, 1, 5]


def test_a_seed_repeats_and_a_row_is_the_same_alone(tiny_model: PreTrainedModel) -> None:
    settings = Settings(sampling=Sampling(temperature=2.0), max_new_tokens=10, seed=3)
    first = continuations(tiny_model, PROMPTS, settings)
    assert first == continuations(tiny_model, PROMPTS, settings)
    assert first[:1] == continuations(tiny_model, PROMPTS[:1], settings)
    unseeded = Settings(sampling=Sampling(temperature=2.0), max_new_tokens=10)
    assert continuations(tiny_model, PROMPTS, unseeded) != continuations(tiny_model, PROMPTS, unseeded)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("family", ["mamba", "hybrid"])
def test_rows_that_go_on_draw_and_are_penalised_as_they_are_alone(family: str, copies: int) -> None:
    model = lively(family)
    way = Sampling(temperature=3.0, top_k=20, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.9)
    lengths = [2, 9, 5, 9, 3, 9][: 3 * copies]
    settings = Settings(sampling=way, max_new_tokens=9, seed=5, copies=copies)
    found: list[list[int]] = [[] for _ in lengths]
    for token in Engine(model).generate(PROMPTS_48, settings, lambda row: len(found[row]) == lengths[row]):
        found[token.row].append(token.id)
    for row, length in enumerate(lengths):
        alone = replace(settings, seed=5 + row, copies=1)
        (expected,) = continuations(model, [PROMPTS_48[row // copies]], alone)
        assert found[row] == expected[:length]


def test_copies_are_rows_of_their_own_that_read_the_prompt_once(tiny_model: PreTrainedModel) -> None:
    counts = []
    handle = tiny_model.backbone.register_forward_pre_hook(
        lambda module, arguments, options: counts.append(options["cache_params"].batch_size), with_kwargs=True
    )
    settings = Settings(sampling=Sampling(temperature=2.0), max_new_tokens=8, seed=3, copies=2)
    rows: list[list[int]] = [[] for _ in range(6)]
    for token in Engine(tiny_model).generate(PROMPTS, settings):
        rows[token.row].append(token.id)
    handle.remove()
    assert counts[0] == 3
    assert set(counts[1:]) == {6}
    for row, tokens_of_row in enumerate(rows):
        alone = Settings(sampling=Sampling(temperature=2.0), max_new_tokens=8, seed=3 + row)
        assert continuations(tiny_model, [PROMPTS[row // 2]], alone) == [tokens_of_row]


def test_the_callers_random_numbers_are_left_alone(tiny_model: PreTrainedModel) -> None:
    before = torch.get_rng_state()
    for temperature in (0.0, 1.0):
        settings = Settings(sampling=Sampling(temperature=temperature), max_new_tokens=2)
        continuations(tiny_model, PROMPTS[:1], settings)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_per_row(tiny_model: PreTrainedModel) -> None:
    sampling = Sampling(temperature=2.0)
    rows = continuations(tiny_model, PROMPTS[:2], Settings(sampling=sampling, max_new_tokens=9, seed=[8, 3]))
    assert rows[:1] == continuations(tiny_model, PROMPTS[:1], Settings(sampling=sampling, max_new_tokens=9, seed=8))
    assert rows[1:] == continuations(tiny_model, PROMPTS[1:2], Settings(sampling=sampling, max_new_tokens=9, seed=3))
    with pytest.raises(ValueError, match="2 seeds for 3 rows"):
        continuations(tiny_model, PROMPTS, Settings(seed=[1, 2]))


def test_logprobs_are_those_of_the_tokens_in_their_context(tiny_model: PreTrainedModel) -> None:
    settings = Settings(sampling=Sampling(temperature=1.5), max_new_tokens=5, seed=1, logprobs=3)
    found = list(Engine(tiny_model).generate(PROMPTS[:1], settings))
    ids = torch.cat([PROMPTS[0], torch.tensor([token.id for token in found])])
    with torch.no_grad():
        logprobs = tiny_model(ids[None]).logits[0].log_softmax(-1)
    for place, token in enumerate(found, len(PROMPTS[0]) - 1):
        assert token.logprob == pytest.approx(float(logprobs[place, token.id]), abs=1e-4)
        assert [pair[0] for pair in token.likeliest] == logprobs[place].topk(3).indices.tolist()
        assert token.likeliest[0][1] == pytest.approx(float(logprobs[place].max()), abs=1e-4)


def test_going_on_behind_a_state(tiny_model: PreTrainedModel) -> None:
    settings = Settings(max_new_tokens=7)
    _, state = read(tiny_model, [PROMPTS[2][:4]])
    found = [token.id for token in Engine(tiny_model).generate([PROMPTS[2][4:]], settings, state=state)]
    assert [found] == continuations(tiny_model, PROMPTS[2:], settings)


def test_a_repetition_penalty_behind_a_state_is_refused(tiny_model: PreTrainedModel) -> None:
    settings = Settings(sampling=Sampling(repetition_penalty=1.1), max_new_tokens=3)
    _, state = read(tiny_model, PROMPTS)
    with pytest.raises(ValueError, match="all that was read, which a State does not tell: use a Session"):
        list(Engine(tiny_model).generate(PROMPTS, settings, state=state))
    found = list(Engine(tiny_model).generate(PROMPTS[:1], settings, state=tiny_model.init_state(1)))
    assert [[token.id for token in found]] == continuations(tiny_model, PROMPTS[:1], settings)


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9)])
def test_logits_that_become_no_numbers_are_told(tiny_model: PreTrainedModel, sampling: Sampling, count: int) -> None:
    """Rows by the CPU's step, and more of them."""
    engine, settings = Engine(tiny_model), Settings(sampling=sampling, max_new_tokens=6)
    logits, state = read(tiny_model, [PROMPTS[0]] * count)
    state.layers[1].ssm[2] = torch.nan
    found = engine.go_on(logits, state, engine.chooser(count, settings), settings)
    assert [next(found).row for _ in range(count + 2)] == [*range(count), 0, 1]
    with pytest.raises(ValueError, match="the logits of row 3 are NaN or infinite"):
        next(found)


@pytest.mark.parametrize("family", ["mamba", "hybrid"])
@pytest.mark.parametrize("error", ERRORS)
def test_what_was_broken_off_leaves_nothing_behind(family: str, error: type[BaseException] | None) -> None:
    model = lively(family)
    engine, settings = Engine(model), Settings(max_new_tokens=6, sampling=Sampling(temperature=1.0), seed=1)
    expected = list(engine.generate(PROMPTS_48, settings))

    break_off(engine, PROMPTS_48, settings, error)
    assert list(engine.generate(PROMPTS_48, settings)) == expected


def test_a_reader_steps_as_the_model_does(tiny_model: PreTrainedModel) -> None:
    _, state = read(tiny_model, PROMPTS)
    reader = Engine(tiny_model).reader(state)
    ids = torch.tensor([4, 5, 6])
    expected, after = step(tiny_model, ids, state)
    assert relative_error(reader(ids), expected) <= FLOAT32
    assert torch.equal(reader.state().position, after.position)


@pytest.mark.parametrize("family", ["mamba", "hybrid"])
def test_nothing_grows_with_the_number_of_generations(family: str) -> None:
    engine = Engine(FAMILIES[family].model())

    def generate(seed: int) -> None:
        way = Sampling(temperature=1.0, repetition_penalty=1.1)
        settings = Settings(sampling=way, seed=seed, max_new_tokens=3, logprobs=seed % 3 or None)
        prompts = [random_tokens(1 + seed % 5), random_tokens(2 + seed % 3)]
        list(engine.generate(prompts, settings, lambda row: row == seed % 3))
        next(engine.generate(prompts, settings))
        session = Session(engine.model, chunk_size=4)
        session.read(prompts[0].tolist())
        list(session.write(settings))

    for seed in range(30):
        generate(seed)
    gc.collect()
    before = len(gc.get_objects())
    for seed in range(60):
        generate(seed)
    gc.collect()
    # A single object that each of them left would be 60.
    assert len(gc.get_objects()) - before < 30


def test_more_log_probabilities_than_tokens_are_refused(tiny_model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=f"logprobs is 999, of a vocabulary of {tiny_model.config.vocab_size} tokens"):
        list(Engine(tiny_model).generate(PROMPTS, Settings(logprobs=999)))
    with pytest.raises(ValueError, match="logprobs is -1; it must be at least 0"):
        Settings(logprobs=-1)


def test_how_it_runs_is_said(tiny_model: PreTrainedModel) -> None:
    assert Engine(tiny_model).explain() == "the CPU step, batches of more than 4 rows eagerly"
    assert Engine(FAMILIES["hybrid"].model()).explain().startswith("eager (a layer is more than")


def test_a_high_repetition_penalty_repeats_nothing(tiny_model: PreTrainedModel) -> None:
    settings = Settings(sampling=Sampling(repetition_penalty=1e6), max_new_tokens=20)
    for prompt, tokens in zip(PROMPTS, continuations(tiny_model, PROMPTS, settings), strict=True):
        assert len({*tokens, *prompt.tolist()}) == len(tokens) + len(prompt)


@pytest.mark.parametrize("wrong", ["max_new_tokens", "chunk_size", "copies"])
def test_a_size_below_one_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong} is 0; it must be at least 1"):
        Settings(**{wrong: 0})
