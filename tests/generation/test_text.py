"""Text as it arrives: whole characters, and nothing of a stop string."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mambalm.generation import Settings, TextStream, generate

SENTENCE = "the quick héllo 😀 brown\nfox, 😀😀 def sort(numbers)"


@pytest.mark.parametrize("split", range(0, 20, 3))
def test_the_pieces_are_the_text(tiny_tokenizer: PreTrainedTokenizerFast, split: int) -> None:
    ids = tiny_tokenizer(SENTENCE)["input_ids"]
    stream = TextStream(tiny_tokenizer, ids[:split])
    pieces = [stream.push(token) for token in ids[split:]]
    text = "".join(pieces) + stream.flush()
    assert tiny_tokenizer.decode(ids[:split]).rstrip("\ufffd") + text.lstrip("\ufffd") == SENTENCE
    assert not any("\ufffd" in piece for piece in pieces[1:])


def test_random_tokens_never_raise(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for seed in range(50):
        choice = random.Random(seed)
        ids = [choice.randrange(len(tiny_tokenizer)) for _ in range(40)]
        stream = TextStream(tiny_tokenizer, ids[:7])
        assert isinstance("".join(map(stream.push, ids[7:])), str)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["brown"], "the quick héllo 😀 "),
        (["fox", "héllo"], "the quick "),
        (["the"], ""),
        (["brownish", "nothing of it"], SENTENCE),
        (["numbers)!"], SENTENCE),
    ],
)
def test_a_stop_string_cuts_and_its_beginning_is_held_back(
    tiny_tokenizer: PreTrainedTokenizerFast, stop: list[str], expected: str
) -> None:
    stream, text = TextStream(tiny_tokenizer, stop=stop), ""
    for token in tiny_tokenizer(SENTENCE)["input_ids"]:
        text += stream.push(token)
        assert expected.startswith(text)
    assert text + stream.flush() == expected
    assert stream.stopped == (expected != SENTENCE)


def test_a_stopped_row_computes_no_further(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    calls = []
    handle = tiny_model.backbone.register_forward_hook(lambda *_: calls.append(1))
    free = "".join(text for _, text in generate(tiny_model, tiny_tokenizer, ["def "], Settings(max_new_tokens=30)))
    whole = len(calls)
    calls.clear()
    stop = free[3:5]
    text = "".join(
        text for _, text in generate(tiny_model, tiny_tokenizer, ["def "], Settings(max_new_tokens=30), [stop])
    )
    handle.remove()
    assert text == free[: free.index(stop)]
    assert len(calls) < whole


def test_an_empty_stop_string_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(tiny_tokenizer, stop=[""])
