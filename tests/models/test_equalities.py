"""The equalities: a row alone = in chunks = token by token = padded in a batch = packed, with gradients and states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from mambalm.models.adapters import attach_adapter
from mambalm.models.common import MambalmForCausalLM
from mambalm.quantization.model import quantize_model
from tests.helpers import assert_close, assert_no_worse, cu_seqlens, splits
from tests.models.forms import (
    FORMS,
    NAMES,
    Read,
    alone,
    contents,
    exact,
    in_chunks,
    joined,
    leaves,
    outcome,
    packed,
    padded,
)
from tests.models.tiny import FAMILIES, tokens

pytestmark = pytest.mark.usefixtures("portable")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("prefix", [0, 3])
def test_float32(name: str, form: Read, prefix: int) -> None:
    model = FAMILIES[name].model()
    chunked = NAMES[FORMS.index(form)] in ("chunks", "tokens")
    lengths = [12, 12] if chunked else [12, 1, 7]
    assert_close(outcome(model, form, lengths, prefix), exact(model, lengths, prefix))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_bfloat16(name: str, form: Read) -> None:
    """No way of reading is worse than twice what one pass over each row loses to rounding."""
    from mambalm import ops

    model = FAMILIES[name].model(residual_in_fp32=False).bfloat16()
    with ops.use_backend("reference"):
        rounded = outcome(model, alone, [12, 12], 3)
    truth = exact(model, [12, 12], 3)
    assert_no_worse(*(joined(found, truth) for found in (outcome(model, form, [12, 12], 3), rounded, truth)))


def variant(name: str, kind: str) -> MambalmForCausalLM:
    """A model whose projections are no plain Linears: packed in few bits, or with adapters beside them."""
    model = FAMILIES[name].model()
    if kind != "lora":
        return quantize_model(model, kind)
    adapted, _ = attach_adapter(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:  # zero at first
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["int8", "int4", "lora"])
def test_quantised_and_adapted(name: str, kind: str) -> None:
    """All forms, with the gradients of what is trained and of the first state."""
    model = variant(name, kind)
    for lengths, forms in (([12, 12], FORMS[:2]), ([12, 1, 7], FORMS[2:])):
        truth = exact(model, lengths, 3)
        assert sum(key.startswith("d ") for key in truth) > len(leaves(model.init_state(1)))
        for form in forms:
            assert_close(outcome(model, form, lengths, 3), truth)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.no_grad()
def test_quantised_without_gradients(name: str, kind: str) -> None:
    """Few rows meet the packed weights, rounded to 16 bits of their largest value; many the unpacked ones."""
    model, rows = variant(name, kind), [tokens(12, seed=i) for i in range(3)]
    state = model(tokens(3, 4), cache_params=model.init_state(3)).cache_params
    logits, final = alone(model, rows, state)
    for form in FORMS:
        found, after = form(model, rows, state)
        assert_close({"logits": torch.cat(found)}, {"logits": torch.cat(logits)}, 1e-3)
        assert_close(contents(after), contents(final), 1e-3)


@settings(max_examples=12)
@given(data=st.data(), name=st.sampled_from(sorted(FAMILIES)), prefix=st.integers(0, 5))
def test_any_split_padding_and_packing(data: st.DataObject, name: str, prefix: int) -> None:
    from mambalm import ops

    model = FAMILIES[name].model()
    lengths = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=3).filter(any))
    extra = data.draw(st.integers(0, 3))
    forms = [packed, padded(data.draw(st.booleans()), extra, data.draw(st.integers(0, 2)))]
    if len(set(lengths)) == 1:
        forms.append(in_chunks(data.draw(splits(lengths[0]))))
    with ops.use_backend("portable"):
        expected = exact(model, lengths, prefix)
        for form in forms:
            assert_close(outcome(model, form, lengths, prefix), expected)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_row_of_padding_keeps_its_state(name: str) -> None:
    model = FAMILIES[name].model()
    state = model(tokens(2, 6), cache_params=model.init_state(2)).cache_params
    for length in (1, 4):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1] = 0
        after = model(tokens(2, length), attention_mask=mask, cache_params=state).cache_params
        assert_close(contents(after[1]), contents(state[1]), 0)
        assert after.position.tolist() == [6 + length, 6]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_padding_inside_a_row_is_removed(name: str) -> None:
    model, row = FAMILIES[name].model(), tokens(1, 6)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1]])
    assert_close(
        {"logits": model(row, attention_mask=mask).logits[:, mask[0] == 1]},
        {"logits": model(row[:, mask[0] == 1]).logits},
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_position_ids_that_restart_are_documents(name: str) -> None:
    model, ids = FAMILIES[name].model(), tokens(2, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 0, 1], [4, 5, 6, 0, 1, 2, 3, 4, 5]])
    documents = [ids[0, :4], ids[0, 4:6], ids[0, 6:7], ids[0, 7:], ids[1, :3], ids[1, 3:]]
    logits, state = alone(model, documents, model.init_state(len(documents)))
    output = model(ids, position_ids=positions, cache_params=model.init_state(len(documents)))
    assert_close({"logits": output.logits.flatten(0, 1)}, {"logits": torch.cat(logits)})
    assert_close(contents(output.cache_params), contents(state))


def loss(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    return model(ids, labels=ids, **arguments).loss


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_counts_each_document_as_if_it_were_alone(name: str) -> None:
    model = FAMILIES[name].model()
    rows = [tokens(length, seed=length) for length in (7, 1, 4)]
    separate = sum(loss(model, row[None]) * (len(row) - 1) for row in rows if len(row) > 1) / 9
    ids = torch.cat(rows)[None]
    assert_close({"loss": loss(model, ids, cu_seqlens=cu_seqlens([0, 7, 8, 12]))}, {"loss": separate})
    for left in (True, False):
        batch, mask = tokens(3, 7, seed=3), torch.zeros(3, 7)
        for i, row in enumerate(rows):
            place = slice(7 - len(row), 7) if left else slice(0, len(row))
            batch[i, place], mask[i, place] = row, 1
        assert_close({"loss": loss(model, batch, attention_mask=mask)}, {"loss": separate})
    given_count = loss(model, ids, cu_seqlens=cu_seqlens([0, 7, 8, 12]), num_items_in_batch=18)
    assert_close({"loss": given_count}, {"loss": separate / 2})


def test_no_state_is_changed_in_place() -> None:
    model = FAMILIES["hybrid"].model()
    state = model(tokens(2, 5), cache_params=model.init_state(2)).cache_params
    before = {name: value.clone() for name, value in contents(state).items()}
    model(tokens(2, 5), cache_params=state)
    model.generate(tokens(2, 3), cache_params=state, max_new_tokens=3, do_sample=False)
    assert_close(contents(state), before, 0)


def test_errors_name_the_tensor() -> None:
    model, ids = FAMILIES["mamba"].model(), tokens(2, 5)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("attention_mask is", {"attention_mask": torch.ones(2, 4)}),
        ("attention_mask is", {"attention_mask": torch.ones(2, 1, 5, 5)}),
        ("position_ids is", {"position_ids": torch.arange(4)[None]}),
        ("one row", {"cu_seqlens": cu_seqlens([0, 5])}),
        ("the state has 3 rows and the input 2", {"cache_params": model.init_state(3)}),
        ("labels is", {"labels": tokens(2, 4)}),
        ("logits_to_keep is", {"logits_to_keep": torch.zeros(2, 2, dtype=torch.long)}),
        ("exactly one of", {"inputs_embeds": torch.zeros(2, 5, 16)}),
    ]
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            model(ids, **arguments)
    for message, argument in {"integers": ids[0], r"\(2, 5\) torch.float32, expected integers": ids.float()}.items():
        with pytest.raises(ValueError, match=f"input_ids is .*{message}"):
            model(argument)
    with pytest.raises(ValueError, match=r"inputs_embeds is \(2, 5\) torch.int64, expected floating point"):
        model(inputs_embeds=ids)
    with pytest.raises(ValueError, match="exclude each other"):
        model(ids[:1], attention_mask=torch.tensor([[0, 1, 1, 1, 1]]), cu_seqlens=cu_seqlens([0, 5]))
    with pytest.raises(ValueError, match=r"cu_seqlens is \(1,\)"):
        model(ids[:1], cu_seqlens=cu_seqlens([0]))
    with pytest.raises(TypeError, match=r"no meaning.*past_key_values, seq_idx"):
        model(ids, past_key_values=(), seq_idx=ids)
    with pytest.raises(ValueError, match="layers"):
        model(ids, cache_params=FAMILIES["mamba"].model(num_hidden_layers=3).init_state(2))
