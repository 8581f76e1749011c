"""Folders of token files, as datatrove writes and reads them, and what mambalm notes beside them.

NAME.ds holds tokens (uint16 where the vocabulary has at most 65,536, else uint32, little-endian, no header);
NAME.ds.index the end of each document (uint64); NAME.ds.hash the eight bytes that decide on which side of a split a
document falls (uint64); NAME.ds.loss, where some tokens are no targets, a byte each; tokens.json everything else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mambalm.data.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METADATA = "tokens.json"
FORMAT = "mambalm-tokens-1"
COMPANIONS = (".index", ".hash", ".loss")


class TokenFileError(ValueError):
    """A folder of token files cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Shard:
    """What is noted of one token file.

    Attributes:
        name: the file's, in its folder.
        documents, tokens: how many.
        text_bytes: of the text that was tokenised, in UTF-8, so that bits per byte can be computed.
        highest: the highest token; -1 if there is none.
        sha256: of the file of tokens, in hexadecimal.
        companions_sha256: of the files beside it (index, hash, loss), one after the other.
    """

    name: str
    documents: int
    tokens: int
    text_bytes: int
    highest: int
    sha256: str
    companions_sha256: str


@dataclass(frozen=True)
class Metadata:
    """tokens.json.

    Attributes:
        vocab_size: every token is below it.
        tokenizer: its name or path, for people.
        tokenizer_fingerprint: a hash of what it does.
        end_token: stands behind every document; None if nothing does.
        shards: in the order of the documents.
        settings: how the files were made.
    """

    vocab_size: int
    tokenizer: str
    tokenizer_fingerprint: str
    end_token: int | None
    shards: tuple[Shard, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of all shards, those between documents included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """Bytes of the text of all shards, in UTF-8."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens, the documents and what is learned of them."""
        sums = "".join(shard.sha256 + shard.companions_sha256 for shard in self.shards)
        return hashlib.sha256(sums.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The text of tokens.json."""
        counts = {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.text_bytes}
        return json.dumps({"format": FORMAT, **counts, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Metadata:
        """The metadata of a folder.

        Raises:
            TokenFileError: there is none, or it cannot be understood.
        """
        path = folder / METADATA
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not folder.exists():
                raise TokenFileError(
                    f"{folder} does not exist: make it with `mambalm tokenize INPUT... -o {folder} --tokenizer NAME`"
                ) from None
            raise TokenFileError(
                f"{folder} has no {METADATA}: finish `mambalm tokenize -o {folder}` or, if datatrove wrote its .ds "
                f"files, run `mambalm tokenize --collect -o {folder} --tokenizer NAME`"
            ) from None
        except ValueError as error:
            raise TokenFileError(f"{path} is damaged ({error}): remove it and tokenise again") from error
        found = values.get("format") if isinstance(values, dict) else None
        if found != FORMAT:
            raise TokenFileError(f"{path} has format {found!r}, expected {FORMAT!r}: tokenise again")
        names = ("vocab_size", "tokenizer", "tokenizer_fingerprint", "end_token", "settings")
        try:
            shards = tuple(Shard(**shard) for shard in values["shards"])
            return cls(shards=shards, **{name: values[name] for name in names})
        except (KeyError, TypeError) as error:
            raise TokenFileError(f"{path} is damaged ({error}): remove it and tokenise again") from error


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of a token in a file, by datatrove's rule."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def companions_checksum(path: Path) -> str:
    """The SHA-256 of the files beside a file of tokens."""
    sha = hashlib.sha256()
    for suffix in COMPANIONS:
        companion = path.with_name(f"{path.name}{suffix}")
        if companion.exists():
            sha.update(companion.read_bytes())
    return sha.hexdigest()


def content_hash(tokens: np.ndarray) -> int:
    """The 64 bits that decide on which side of a split a document with these tokens falls, whatever their type."""
    return int.from_bytes(hashlib.blake2b(tokens.astype("<u4").tobytes(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class ShardArrays:
    """The contents of a shard, mapped from its files or in memory.

    Attributes:
        tokens: (tokens).
        ends: uint64 (documents), where each document ends.
        hashes: uint64 (documents), or None where they were not kept.
        learned: bool (tokens), whether a token is a target; None if all are.
    """

    tokens: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray | None = None
    learned: np.ndarray | None = None


def open_shard(folder: Path, shard: Shard, vocab_size: int) -> ShardArrays:
    """Map the files of a shard.

    Raises:
        TokenFileError: a file is missing, or its size or index contradicts the metadata.
    """
    path = folder / shard.name
    tokens = _mapped(path, token_dtype(vocab_size), shard.tokens)
    index = path.with_name(f"{shard.name}.index")
    ends = _mapped(index, np.dtype("<u8"), shard.documents)
    last = int(ends[-1]) if shard.documents else 0
    if last != shard.tokens:
        raise TokenFileError(f"{index} ends at token {last:,}, but {path.name} has {shard.tokens:,}: {_AGAIN}")
    hashes, learned = (path.with_name(f"{shard.name}.{suffix}") for suffix in ("hash", "loss"))
    return ShardArrays(
        tokens,
        ends,
        _mapped(hashes, np.dtype("<u8"), shard.documents) if hashes.exists() else None,
        _mapped(learned, np.dtype(np.bool_), shard.tokens) if learned.exists() else None,
    )


def require_tokenizer(folder: Path, metadata: Metadata, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise TokenFileError unless the folder was made with this tokenizer."""
    if tokenizer_fingerprint(tokenizer) != metadata.tokenizer_fingerprint:
        raise TokenFileError(
            f"{folder} was tokenised with {metadata.tokenizer} ({metadata.vocab_size:,} tokens), not with "
            f"{tokenizer.name_or_path or 'this tokenizer'}: tokenise it again, or take its tokenizer"
        )


_AGAIN = "the file is damaged; remove it and run the command that wrote it again, or copy it again"


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> np.ndarray:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise TokenFileError(f"{path} is missing: {_AGAIN}") from None
    if size != count * dtype.itemsize:
        raise TokenFileError(f"{path} has {size:,} bytes, expected {count * dtype.itemsize:,}: {_AGAIN}")
    # A file without bytes cannot be mapped.
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)
