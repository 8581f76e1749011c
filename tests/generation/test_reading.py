"""Reading prompts: in chunks and batches what is read at once, and what cannot be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mambalm.generation import read, step
from mambalm.generation.reading import chosen_chunk_size
from tests.helpers import FLOAT32, relative_error
from tests.models.tiny import FAMILIES

PROMPTS = [torch.tensor(ids) for ids in ([5, 9, 13], [7], [11, 3, 8, 2, 250, 17, 33, 4, 99])]


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


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_logits_that_are_no_numbers_are_refused(tiny_model: PreTrainedModel, chunk_size: int) -> None:
    state = tiny_model.init_state(len(PROMPTS))
    state.layers[0].ssm[1] = torch.nan
    with pytest.raises(ValueError, match=r"logits after prompt 2 are NaN.*too large for float32"):
        read(tiny_model, PROMPTS, state, chunk_size=chunk_size)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinite_logits_are_refused_as_well(tiny_model: PreTrainedModel, value: float) -> None:
    def overflows(module: object, arguments: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([7]), value)

    handle = tiny_model.lm_head.register_forward_hook(overflows)
    with pytest.raises(ValueError, match="logits after prompt 1 are NaN or infinite"):
        read(tiny_model, PROMPTS)
    value = -torch.inf  # a token that is forbidden
    assert read(tiny_model, PROMPTS)[0][:, 7].tolist() == [value] * 3
    handle.remove()


def test_activation_memory_is_that_of_a_chunk(tiny_model: PreTrainedModel) -> None:
    lengths = []
    handle = tiny_model.backbone.register_forward_pre_hook(
        lambda module, arguments, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    read(tiny_model, [torch.arange(100), torch.arange(41)], chunk_size=16)
    handle.remove()
    assert lengths == [16] * 6 + [4]


def test_chunks_end_at_multiples_of_the_absolute_position(tiny_model: PreTrainedModel) -> None:
    lengths = []
    handle = tiny_model.backbone.register_forward_pre_hook(
        lambda module, arguments, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    text = torch.arange(60)
    whole, expected = read(tiny_model, [text], chunk_size=16)
    _, state = read(tiny_model, [text[:32]], chunk_size=16)
    resumed, found = read(tiny_model, [text[32:]], state, chunk_size=16)
    assert lengths == [16, 16, 16, 12] * 2
    assert torch.equal(resumed, whole)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(one.ssm, other.ssm)
    lengths.clear()
    _, state = read(tiny_model, [text[:5], text[:18]], chunk_size=16)
    read(tiny_model, [text[5:], text[18:20]], state, chunk_size=16)
    assert lengths == [16, 2, 11, 16, 16, 12]
    handle.remove()


def test_rows_too_long_for_one_batch_are_read_in_turn(tiny_model: PreTrainedModel) -> None:
    shapes = []
    handle = tiny_model.backbone.register_forward_pre_hook(
        lambda module, arguments, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    prompts = [torch.arange(length) % 300 for length in (5000, 3000, 4000, 10)]
    logits, state = read(tiny_model, prompts, chunk_size=8192)
    handle.remove()
    assert shapes == [(2, 5000), (2, 4000)]
    assert state.position.tolist() == [5000, 3000, 4000, 10]
    assert relative_error(logits[3], read(tiny_model, prompts[3:])[0][0]) <= FLOAT32


def test_rows_read_in_turn_go_on_from_their_own_states(tiny_model: PreTrainedModel, monkeypatch: Any) -> None:
    monkeypatch.setattr("mambalm.generation.reading._LONGEST", 8)
    _, state = read(tiny_model, PROMPTS)
    further = [torch.arange(length) for length in (5, 3, 4)]
    logits, after = read(tiny_model, further, state, chunk_size=8)
    assert after.position.tolist() == [8, 4, 13]
    for row, (before, more) in enumerate(zip(PROMPTS, further, strict=True)):
        assert relative_error(logits[row], read(tiny_model, [torch.cat([before, more])])[0][0]) <= FLOAT32


def test_the_chunk_is_chosen_by_model_and_device(tiny_model: PreTrainedModel) -> None:
    assert chosen_chunk_size(tiny_model) == 2048
    with torch.device("meta"):
        model = FAMILIES["falcon_mamba"].ours(
            FAMILIES["falcon_mamba"].config(hidden_size=4096, intermediate_size=8192, num_hidden_layers=1)
        )
    assert chosen_chunk_size(model.bfloat16()) == 4096


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


@pytest.mark.parametrize(
    ("prompt", "given"),
    [
        ([1, 2], "list"),
        (torch.ones(1, 2, dtype=torch.long), r"shape \(1, 2\)"),
        (torch.ones(2), "torch.float32"),
        (torch.ones(2, dtype=torch.bool), "torch.bool"),
    ],
)
def test_a_prompt_that_is_no_row_of_tokens_is_named(tiny_model: PreTrainedModel, prompt: Any, given: str) -> None:
    with pytest.raises(TypeError, match=rf"^prompt 1 (must be a tensor of token ids \(l\), got|is) {given}"):
        read(tiny_model, [prompt])
