"""Byte-level byte-pair tokenizers that lose nothing: decoding gives every byte back."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most ``vocab_size`` tokens.

    Token 0 is ``<|endoftext|>``: it stands before every document and serves as beginning, end and padding.

    Raises:
        ValueError: the vocabulary has no room for the 256 bytes and the special token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"a byte-level vocabulary needs more than {len(alphabet)} tokens, got vocab_size={vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> np.ndarray:
    """One stream of token ids, int64 (tokens): every text after the tokenizer's beginning-of-text token.

    A special token spelled out in a text is read as text, so that a corpus that mentions it cannot end a document.
    """
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    backend.encode_special_tokens = before
    begin = [tokenizer.bos_token_id]
    return np.concatenate([np.array(begin + encoding.ids, dtype=np.int64) for encoding in encodings])


# Spaces, digits, capitals, letters of several scripts: what tokenizers treat differently.
_PROBE = (
    "The quick  brown fox\n\tjumps over 1,234.5 lazy dogs; naïve Ünïcode ½ 日本語 العربية 🐍 def f(x): return x**2\r\n"
)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary and of what the tokenizer makes of a text, the same in every version of transformers."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    probe = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(repr((words, list(probe))).encode("utf-8", "surrogatepass")).hexdigest()[:16]


# What transformers reads a tokenizer from.
_FILES = ("tokenizer*", "vocab.*", "*merges.txt", "*.model", "*.tiktoken", "tekken.json")
# What else it looks at: which class it is, other special tokens, the chat's templates.
_BESIDE = ("config.json", "*special_tokens_map.json", "added_tokens.json", "chat_template*", "*chat_templates/*")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_tokenizer(path_or_hub_id: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or a repository.

    The Hub is asked once; where it does not answer, what its cache holds is taken.

    Raises:
        ValueError: there is no such folder or repository, or transformers can load no tokenizer from there.
    """
    # Seconds, which --help and a mistyped option need not wait for.
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    place = Path(path_or_hub_id).expanduser()
    if place.is_file():
        raise ValueError(f"{path_or_hub_id} is a file: name the folder that holds the tokenizer's files")
    where, refusal = (place, None) if path_or_hub_id and place.exists() else _fetched(path_or_hub_id)
    remedy = "put its tokenizer.json there, or name another with --tokenizer"
    # Beside a model of a type that it does not know (hybrids), transformers warns of what is not done.
    log = logging.getLogger("transformers.configuration_utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        # Without local_files_only transformers asks the Hub for file after file, and where there is none tries each for
        # half a minute.
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if refusal is not None:
            raise ValueError(refusal) from error
        there = any(path for pattern in _FILES for path in Path(where).glob(pattern))
        reason = " ".join(str(error).split()) if there else "none of its files is there"
        what = f"{path_or_hub_id} has no tokenizer that transformers can load ({reason})"
        raise ValueError(f"{what}; {remedy}") from error
    finally:
        log.setLevel(level)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    # Where a folder has a model's configuration alone, transformers makes its tokenizer without any words.
    if len(tokenizer) == len(tokenizer.get_added_vocab()):
        raise ValueError(f"{path_or_hub_id} has no tokenizer's vocabulary; {remedy}")
    return tokenizer


def _fetched(name: str) -> tuple[Path | str, str | None]:
    """A repository's folder, with a tokenizer's files from the Hub; or its name and why the Hub gave none.

    Raises:
        ValueError: it is no repository's name.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"{name!r} does not exist: name a tokenizer's folder or a repository of the Hub (owner/name)")
    try:
        return Path(snapshot_download(name, allow_patterns=[*_FILES, *_BESIDE])), None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        return name, (
            f"{name} is no folder here, and its tokenizer could not be had from the Hugging Face Hub nor from its "
            f"cache ({str(error).strip().splitlines()[0]}): check the name, log in if it is private, or, offline, pass "
            "the path of a folder that you downloaded"
        )
