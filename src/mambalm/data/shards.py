"""Writing one token file: whole or not at all, with the counts and checksums that verify it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mambalm.data.token_files import (
    COMPANIONS,
    METADATA,
    Metadata,
    Shard,
    TokenFileError,
    companions_checksum,
    content_hash,
    open_shard,
    token_dtype,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where a folder keeps what is not finished, and what is noted of shards that are.
STAGING = ".partial"
# Of text that is encoded at once: enough for a batch, little beside a shard.
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Encoded:
    """Documents in tokens.

    Attributes:
        documents: each (tokens), of the files' type.
        learned: each bool (tokens), for chats; else None.
        text_bytes: of their text in UTF-8.
    """

    documents: list[np.ndarray]
    learned: list[np.ndarray] | None
    text_bytes: int


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], end_token: int | None) -> Iterator[Encoded]:
    """Texts as documents that end with ``end_token``; special tokens spelled out in a text are text."""
    dtype = token_dtype(len(tokenizer))
    end = [] if end_token is None else [end_token]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
    for batch in _batches(texts):
        if backend is None:
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in batch]
        else:
            ids = [encoding.ids for encoding in backend.encode_batch_fast(batch, add_special_tokens=False)]
        yield Encoded([np.array(row + end, dtype) for row in ids], None, sum(len(text.encode()) for text in batch))


def write_shard(folder: Path, name: str, batches: Iterable[Encoded], vocab_size: int) -> Shard:
    """Write documents to ``folder / name`` and the files beside it; they appear when all of them are complete.

    Raises:
        TokenFileError: a token is not below ``vocab_size``.
    """
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    staging = folder / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(vocab_size)
    file: Any = None
    sha, hashes, count, text_bytes, highest = hashlib.sha256(), [], 0, 0, -1
    for encoded in batches:
        if file is None:
            masked = encoded.learned is not None
            file = TokenizedFile(str(staging), name, token_size=dtype.itemsize, save_loss_metadata=masked)
        data = np.concatenate(encoded.documents)
        highest = max(highest, int(data.max(initial=0)))
        if highest >= vocab_size:
            raise TokenFileError(f"the tokenizer gives token {highest}, which is not below vocab_size {vocab_size}")
        hashes += [content_hash(document) for document in encoded.documents]
        file.write_bytes(data.tobytes(), np.cumsum([len(d) for d in encoded.documents]).tolist())
        if encoded.learned is not None:
            file.write_loss_bytes(np.concatenate(encoded.learned).tobytes())
        sha.update(data.tobytes())
        count, text_bytes = count + len(data), text_bytes + encoded.text_bytes
    if file is not None:
        file.close()
        (staging / f"{name}.hash").write_bytes(np.array(hashes, "<u8").tobytes())
        _publish(staging, folder, name)
    checksums = sha.hexdigest(), companions_checksum(folder / name)
    shard = Shard(name, len(hashes), count, text_bytes, highest, *checksums)
    note(folder, shard)
    return shard


def note(folder: Path, shard: Shard) -> None:
    """Note that a shard is complete."""
    path = folder / STAGING / f"{shard.name}.json"
    write_whole(path, json.dumps(asdict(shard)))


def noted(folder: Path) -> dict[str, Shard]:
    """The shards that are complete, by name."""
    found = [Shard(**json.loads(path.read_text())) for path in sorted((folder / STAGING).glob("*.ds.json"))]
    return {shard.name: shard for shard in found}


def write_whole(path: Path, text: str) -> None:
    """Write a small file, so that it is either the old or the new one whenever the process is killed."""
    temporary = path.with_name(f"{path.name}.incomplete")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def verify(folder: Path) -> Metadata:
    """Read every token of a folder and compare it with what tokens.json says.

    Raises:
        TokenFileError: a count, a checksum or an index differs, or a token is outside of the vocabulary.
    """
    metadata = Metadata.read(folder)
    for shard in metadata.shards:
        arrays, path = open_shard(folder, shard, metadata.vocab_size), folder / shard.name
        if (np.diff(arrays.ends.astype(np.int64)) < 0).any():
            raise TokenFileError(f"{path}.index goes backwards: the file is damaged; tokenise or copy it again")
        sha, highest = hashlib.sha256(), -1
        for first in range(0, shard.tokens, 1 << 22):
            block = np.asarray(arrays.tokens[first : first + (1 << 22)])
            sha.update(block.tobytes())
            highest = max(highest, int(block.max()))
        if highest >= metadata.vocab_size:
            raise TokenFileError(
                f"{path} holds token {highest}, but the vocabulary of {folder / METADATA} has {metadata.vocab_size}: "
                "another tokenizer wrote it"
            )
        if sha.hexdigest() != shard.sha256:
            raise TokenFileError(f"{path} differs from its checksum: it is damaged; tokenise or copy it again")
        if companions_checksum(path) != shard.companions_sha256:
            beside = ", ".join(f"{path.name}{suffix}" for suffix in COMPANIONS)
            raise TokenFileError(f"one of {beside} in {folder} is damaged: tokenise or copy it again")
    return metadata


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _publish(staging: Path, folder: Path, name: str) -> None:
    for suffix in ("", *COMPANIONS):
        written = staging / f"{name}{suffix}"
        if written.exists():
            with written.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(written, folder / written.name)
