"""Text as it arrives: whole characters, and nothing of a stop string."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mambalm.generation import Sampling, Settings, TextStream, decode, generate

SENTENCE = "the quick héllo 😀 brown\nfox, 😀😀 def sort(numbers)"


@pytest.mark.parametrize("split", range(0, 20, 3))
def test_the_pieces_are_the_text(tiny_tokenizer: PreTrainedTokenizerFast, split: int) -> None:
    ids = tiny_tokenizer(SENTENCE)["input_ids"]
    stream = TextStream(tiny_tokenizer, ids[:split])
    pieces = [stream.push(token) for token in ids[split:]]
    text = "".join(pieces) + stream.flush()
    assert tiny_tokenizer.decode(ids[:split]).rstrip("\ufffd") + text.lstrip("\ufffd") == SENTENCE
    assert not any("\ufffd" in piece for piece in pieces[1:])


@pytest.fixture(scope="module")
def fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece has it (Llama, Codestral Mamba): a space before words, none before a text, bytes of the rest."""
    vocabulary = {token: id for id, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a")]
    for token in ["▁", *"abcdefghijklmnopqrstuvwxyz.,é", *map("".join, merges)]:
        vocabulary.setdefault(token, len(vocabulary))
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)  # type: ignore[arg-type]
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("text", ["the a é 😀 the\tX", "😀 a", " two  spaces", "漢字 and ñ"])
def test_bytes_where_there_is_no_token(fallback: PreTrainedTokenizerFast, text: str) -> None:
    ids = fallback(text)["input_ids"]
    stream = TextStream(fallback)
    assert "".join(map(stream.push, ids)) + stream.flush() == text == fallback.decode(ids)
    for split in range(1, len(ids)):
        begun = fallback.decode(ids[:split]).rstrip("\ufffd")
        stream = TextStream(fallback, [1, *ids[:split]])
        assert begun + "".join(map(stream.push, ids[split:])) + stream.flush() == text
    stream, cut = TextStream(fallback, stop=["é 😀"]), TextStream(fallback, stop=["😀 a"])
    assert "".join(map(stream.push, ids)) + stream.flush() == text.partition("é 😀")[0]
    assert "".join(map(cut.push, ids)) + cut.flush() == text.partition("😀 a")[0]


def test_bytes_that_make_no_character_never_raise_and_stop_nothing(fallback: PreTrainedTokenizerFast) -> None:
    """Some of them also change how the bytes before them read, and some ids are no token of the tokenizer's."""
    emoji = [3 + byte for byte in "T😀".encode()]
    for seed in range(300):
        choice = random.Random(seed)
        noise = [choice.choice([*emoji, *range(len(fallback) + 9)]) for _ in range(30)]
        stream = TextStream(fallback, noise[: seed % 9], ["fox"])
        text = "".join(map(stream.push, [*noise, *fallback("a the fox")["input_ids"]])) + stream.flush()
        assert stream.stopped
        assert text.endswith(" a the ")
    stream = TextStream(fallback)
    # A byte that was given out before one that belongs to nothing; then sixteen of these.
    assert [stream.push(3 + byte) for byte in b"T\xf0"] == ["T", ""]
    assert stream.push(fallback.convert_tokens_to_ids("a")) == "\ufffda"
    assert "".join(stream.push(3 + 0x9F) for _ in range(16)) == 16 * "\ufffd"


def test_tokens_without_a_text_are_passed_over(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    stream, text = TextStream(tiny_tokenizer, [0], ["brown"]), ""
    for token in tiny_tokenizer(SENTENCE)["input_ids"]:
        text += stream.push(0) + stream.push(len(tiny_tokenizer) + 3) + stream.push(token)
    assert text + stream.flush() == SENTENCE.partition("brown")[0]


def test_tokens_without_a_text_leave_the_space_before_a_word(fallback: PreTrainedTokenizerFast) -> None:
    """However many: a word behind them is not the first of the text."""
    the, a = (fallback.convert_tokens_to_ids(f"▁{word}") for word in ("the", "a"))
    for silent in (2, len(fallback) + 4):
        stream = TextStream(fallback)
        assert "".join(map(stream.push, [the, *[silent] * 20, a, *[silent] * 20, a])) == "the a a"


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


def test_of_several_stop_strings_the_first_in_the_text_cuts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Where one token brings both, in whatever order they are named."""
    token = max(range(1, len(tiny_tokenizer)), key=lambda token: len(tiny_tokenizer.decode([token])))
    text = tiny_tokenizer.decode([token])
    for stop in ([text[2], text[-1]], [text[-1], text[2]]):
        stream = TextStream(tiny_tokenizer, stop=stop)
        assert stream.push(token) == text[: text.index(text[2])]
        assert stream.stopped


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


def test_each_row_has_a_text_of_its_own(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Less the token that ends it, special or not."""
    prompts = ["def ", "the quick"]
    settings = Settings(sampling=Sampling(temperature=40.0), max_new_tokens=12, seed=1, copies=2)
    ids = [torch.tensor(tiny_tokenizer(prompt)["input_ids"]) for prompt in prompts]
    rows: list[list[int]] = [[] for _ in range(4)]
    for row, token in decode(tiny_model, ids, settings):
        rows[row].append(token)
    ends = frozenset(row[5 + number] for number, row in enumerate(rows))
    texts = [""] * 4
    for row, text in generate(tiny_model, tiny_tokenizer, prompts, replace(settings, end_tokens=ends)):
        texts[row] += text
    for row, text in zip(rows, texts, strict=True):
        kept = row[: next(place for place, token in enumerate(row) if token in ends)]
        # The beginning of a character that was not finished is not told.
        assert text.rstrip("\ufffd") == tiny_tokenizer.decode(kept, skip_special_tokens=True).rstrip("\ufffd")


def test_an_empty_stop_string_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(tiny_tokenizer, stop=[""])
