"""The engine beside transformers' `generate` and beside reading in one piece."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from mambalm.generation import Sampling, Settings, decode, end_tokens, read, step
from tests.helpers import FLOAT32, relative_error

PROMPTS = [torch.tensor(ids) for ids in ([5, 9, 13], [7], [11, 3, 8, 2, 250, 17, 33, 4, 99])]


def continuations(model: PreTrainedModel, prompts: list[torch.Tensor], settings: Settings) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for row, token in decode(model, prompts, settings):
        rows[row].append(token)
    return rows


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 100])
def test_reading_in_chunks_is_reading_at_once(tiny_model: PreTrainedModel, chunk_size: int) -> None:
    logits, state = read(tiny_model, PROMPTS, chunk_size=chunk_size)
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            output = tiny_model(prompt[None], cache_params=tiny_model.init_state(1), use_cache=True)
        assert relative_error(logits[row], output.logits[0, -1]) <= FLOAT32
        for found, expected in zip(state.index(row).layers, output.cache_params.layers, strict=True):
            assert relative_error(found.ssm, expected.ssm) <= FLOAT32
            assert relative_error(found.conv, expected.conv) <= FLOAT32
    assert state.position.tolist() == [3, 1, 9]


def test_reading_goes_on_from_a_state(tiny_model: PreTrainedModel) -> None:
    prompt = PROMPTS[2]
    expected, _ = read(tiny_model, [prompt])
    _, state = read(tiny_model, [prompt[:4]])
    assert relative_error(read(tiny_model, [prompt[4:]], state)[0], expected) <= FLOAT32
    for token in prompt[4:]:
        logits, state = step(tiny_model, token[None], state)
    assert relative_error(logits, expected) <= FLOAT32


def test_activation_memory_is_that_of_a_chunk(tiny_model: PreTrainedModel) -> None:
    lengths = []
    handle = tiny_model.backbone.register_forward_pre_hook(
        lambda module, arguments, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    read(tiny_model, [torch.arange(100), torch.arange(41)], chunk_size=16)
    handle.remove()
    assert lengths == [16] * 6 + [4]


def test_greedy_tokens_are_those_of_generate(tiny_model: PreTrainedModel) -> None:
    settings = Settings(max_new_tokens=12, end_tokens=end_tokens(tiny_model))
    for prompt, tokens in zip(PROMPTS, continuations(tiny_model, PROMPTS, settings), strict=True):
        expected = tiny_model.generate(prompt[None], max_new_tokens=12, do_sample=False)
        assert tokens == expected[0, len(prompt) :].tolist()


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


def test_a_high_repetition_penalty_repeats_nothing(tiny_model: PreTrainedModel) -> None:
    settings = Settings(sampling=Sampling(repetition_penalty=1e6), max_new_tokens=20)
    for prompt, tokens in zip(PROMPTS, continuations(tiny_model, PROMPTS, settings), strict=True):
        assert len({*tokens, *prompt.tolist()}) == len(tokens) + len(prompt)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt"),
        ([PROMPTS[0], torch.tensor([], dtype=torch.long)], "prompt 2 has no tokens"),
        ([torch.tensor([5000])], "prompt 1 has token ids from 5000 to 5000, but the model's vocabulary has"),
    ],
)
def test_a_wrong_prompt_is_named(tiny_model: PreTrainedModel, prompts: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tiny_model, prompts)


@pytest.mark.parametrize("wrong", ["max_new_tokens", "chunk_size"])
def test_a_size_below_one_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong} is 0; it must be at least 1"):
        Settings(**{wrong: 0})
