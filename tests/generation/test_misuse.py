"""What is easily given in place of what is meant: refused at once, with what to give instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MambaForCausalLM as Stock
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mambalm.generation import Engine, Session, Settings, TextStream, generate

TOKENS = torch.tensor([3, 4, 5])
TWO = Settings(max_new_tokens=2)
CASES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "a text as prompts": (lambda model, tokenizer: list(generate(model, tokenizer, "fox", TWO)), "such as [prompt]"),
    "a text as stop": (lambda model, tokenizer: TextStream(tokenizer, stop="end"), "such as ['end']"),
    "a batch tensor": (lambda model, tokenizer: next(Engine(model).generate(TOKENS[None], TWO)), "as list(batch) is"),
    "numbers": (lambda model, tokenizer: next(Engine(model).generate([TOKENS.float()], TWO)), "ids are integers"),
    "an end token": (
        lambda model, tokenizer: Settings(end_tokens=tokenizer.eos_token_id),
        "end_tokens is 0: give a set",
    ),
    "a text read": (lambda model, tokenizer: Session(model, tokenizer).read("fox"), "['input_ids'], not a str"),
    "an encoding": (lambda model, tokenizer: Session(model).read(tokenizer("fox")), "not a BatchEncoding"),
    "stock": (lambda model, tokenizer: Engine(Stock(model.config)), "MambaForCausalLM hands no state on: load the"),
    "stock in a session": (lambda model, tokenizer: Session(Stock(model.config)), "hands no state on"),
}


@pytest.mark.parametrize("name", CASES)
def test_is_refused(name: str, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    call, message = CASES[name]
    with pytest.raises(TypeError) as error:
        call(tiny_model, tiny_tokenizer)
    assert message in str(error.value)


def test_end_tokens_may_be_any_collection(tiny_model: PreTrainedModel) -> None:
    assert Settings(end_tokens=[0, 1]).end_tokens == frozenset({0, 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_size is 0"):
        Session(tiny_model, chunk_size=0)


def test_a_session_reads_a_tensor_as_its_list(tiny_model: PreTrainedModel) -> None:
    one, other = Session(tiny_model), Session(tiny_model)
    one.read(TOKENS)
    other.read(TOKENS.tolist())
    assert one.snapshot.digest == other.snapshot.digest
