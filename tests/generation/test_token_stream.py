"""The tokens of a text in pieces are those of the whole text, whatever the tokenizer splits at."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mambalm.generation.token_stream import Mark, TokenStream

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = (
    "111 222 111 the quick brown fox doesn't jump over 1234567 lazy dogs.\n\n  def f(x):\n\treturn x\n"
    " héllo wörld 你好。世界"
)
PIECES = [
    *SEED.split(" "), " ", "  ", "\n", "\n\n", "\r\n", "\t", ".", "...", "!\n", "😀", "👩‍👩‍👧", "e\u0301", "a",
    "12", "999999", "你好", "，", "<end>", "don't", "\u00a0", "ﬁ", "\ufeff",
]  # fmt: skip


def byte_level(*pre: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(pre))
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [SEED] * 3,
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False, special_tokens=["<end>"]),
    )
    return backend


def sentencepiece(pre: pre_tokenizers.PreTokenizer | None) -> Tokenizer:
    """Like Llama 2's and Codestral's: spaces become ▁, one in front of the text; without `pre` all is one word."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if pre is not None:
        backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre
    tokens = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        [part for part in SEED.split(" ") for _ in range(3)],
        trainers.BpeTrainer(vocab_size=420, show_progress=False, special_tokens=tokens),
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def build(name: str) -> PreTrainedTokenizerFast:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merged = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = {
        "gpt2": lambda: byte_level(plain),
        "neox": lambda: byte_level(plain, normalizer=normalizers.NFC()),
        "prefix space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "llama3": lambda: byte_level(pre_tokenizers.Split(Regex(LLAMA3), "isolated"), merged),
        "digits from the right": lambda: byte_level(
            pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*(?:\D|$))|\s+|\p{L}+"), "isolated"), merged
        ),
        "falcon": lambda: byte_level(
            pre_tokenizers.Punctuation("contiguous"),
            plain,
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ),
        "metaspace": lambda: sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first")),
        "one word": lambda: sentencepiece(None),
    }[name]()
    if name in ("neox", "llama3"):
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(single="<end> $A <end>", special_tokens=[("<end>", 0)]),
            ]
        )
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of bytes that end within characters."""
    monkeypatch.setattr("mambalm.generation.token_stream._BLOCK", 101)


NAMES = ["gpt2", "neox", "prefix space", "llama3", "digits from the right", "falcon", "metaspace", "one word"]


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return build(request.param)


def stream(tokenizer: PreTrainedTokenizerFast, text: str, **options: Any) -> list[list[int]]:
    return list(TokenStream(tokenizer, io.BytesIO(text.encode()), **{"window": 400, "margin": 60} | options))


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def text_of(seed: int, pieces: int) -> str:
    generator = random.Random(seed)
    return "".join(generator.choice(PIECES) + generator.choice(["", " "]) for _ in range(pieces))


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_whole_text(
    tokenizer: PreTrainedTokenizerFast, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mambalm.generation.token_stream._BLOCK", 100 + seed)
    text = text_of(seed, 4000)
    parts = stream(tokenizer, text)
    assert len(parts) > 5
    assert joined(parts) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("run", [" ", "1", "\n", "a", "你", "!", " \n", "-"])
def test_long_runs(tokenizer: PreTrainedTokenizerFast, run: str) -> None:
    text = text_of(1, 300) + run * 1500 + text_of(2, 300)
    assert joined(stream(tokenizer, text)) == tokenizer(text)["input_ids"]


def test_a_margin_that_is_too_small_is_noticed(tokenizer: PreTrainedTokenizerFast) -> None:
    text = text_of(3, 600)
    assert joined(stream(tokenizer, text, margin=0)) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("text", ["", "a", "the quick fox", " ", "\n"])
def test_short_texts(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert joined(stream(tokenizer, text)) == tokenizer(text)["input_ids"]
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert joined(stream(tokenizer, text, begin=False)) == expected


def test_the_window_stays_small(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, encode = [], TokenStream._encode

    def watched(self: TokenStream, text: str) -> object:
        lengths.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(TokenStream, "_encode", watched)
    stream(tokenizer, text_of(0, 5000))
    assert len(lengths) > 20
    assert max(lengths) < 1000


def test_taken_up_from_a_mark(tokenizer: PreTrainedTokenizerFast) -> None:
    text = text_of(5, 2000)
    data, first = text.encode(), []
    before = TokenStream(tokenizer, io.BytesIO(data), window=400, margin=60)
    for _, tokens in zip(range(4), before, strict=False):
        first += tokens
    mark = Mark(**asdict(before.mark))
    assert mark.offset > 0
    rest = joined(TokenStream(tokenizer, io.BytesIO(data), mark=mark, window=400, margin=60))
    assert first + rest == tokenizer(text)["input_ids"]
    for other in (b"x" + data[1:], data[: mark.offset - 1]):
        with pytest.raises(ValueError, match="the text is another one"):
            TokenStream(tokenizer, io.BytesIO(other), mark=mark)


def test_what_is_no_text_is_refused() -> None:
    tokenizer = build("gpt2")
    for data in (b"abc\xff\xfe", "né".encode()[:-1]):
        with pytest.raises(ValueError, match="is not UTF-8"):
            list(TokenStream(tokenizer, io.BytesIO(data)))
