"""Byte-level tokenizers: nothing is lost, special tokens in a text are text."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, MambaConfig

from mambalm.data.tokenizer import END_OF_TEXT, encode_documents, load_tokenizer, train_tokenizer

TEXTS = ["def f(x):\n    return x\n" * 20, "für\t\r\n∀ \x00 🐍" * 3]


def test_nothing_is_lost() -> None:
    tokenizer = train_tokenizer(TEXTS[:1], 300)
    for text in (*TEXTS, f"a {END_OF_TEXT} b", "  spaces .  and ' marks"):
        ids = encode_documents(tokenizer, [text])
        assert ids[0] == tokenizer.bos_token_id == 0
        assert 0 not in ids[1:]
        assert tokenizer.decode(ids[1:].tolist()) == text


def test_documents_follow_one_another() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    one, two = (encode_documents(tokenizer, [text]).tolist() for text in TEXTS)
    assert encode_documents(tokenizer, TEXTS).tolist() == one + two


def test_training_is_repeatable_and_survives_saving(tmp_path: Path) -> None:
    first, second = train_tokenizer(TEXTS, 300), train_tokenizer(TEXTS, 300)
    assert first.get_vocab() == second.get_vocab()
    assert 257 < len(first) <= 300
    first.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS[0])["input_ids"] == first(TEXTS[0])["input_ids"]
    assert loaded.eos_token == END_OF_TEXT


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 256 tokens, got vocab_size=256"):
        train_tokenizer(TEXTS, 256)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    """Of a model's configuration alone transformers makes a tokenizer that knows no words."""
    MambaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer's vocabulary; put its tokenizer\.json there"):
        load_tokenizer(str(tmp_path))
