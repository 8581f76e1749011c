"""Byte-level tokenizers: nothing is lost, special tokens in a text are text."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import huggingface_hub
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


def test_without_a_network_the_hub_is_asked_once(asked_hosts: list[str]) -> None:
    begin = time.monotonic()
    for name in ("mambalm-tests/none", "mambalm-none"):
        with pytest.raises(ValueError, match=rf"{name} is no folder here.*\(Got: .*offline, pass the path"):
            load_tokenizer(name)
    asks = len(asked_hosts)
    assert time.monotonic() - begin < 10, "nothing is tried again and again"
    for name in ("/nowhere/tokenizer", "a name", ""):
        with pytest.raises(ValueError, match="does not exist: name a tokenizer's folder"):
            load_tokenizer(name)
    assert len(asked_hosts) == asks, "what is no repository's name is not asked for"


def test_what_the_hub_gives_and_what_its_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--mambalm-tests--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    made = train_tokenizer(TEXTS, 300)
    made.save_pretrained(folder)
    assert load_tokenizer("mambalm-tests/tiny").get_vocab() == made.get_vocab()
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"mambalm-tests/tiny has no tokenizer .*none of its files is there"):
        load_tokenizer("mambalm-tests/tiny")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json is a file: name the folder"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_beside_a_model_that_transformers_does_not_know_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tokenizer(["some text"], 300).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mambalm_hybrid"}')
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert load_tokenizer(str(tmp_path)).eos_token == END_OF_TEXT
    assert not caplog.records
