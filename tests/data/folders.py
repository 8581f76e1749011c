"""Small folders of token files for the tests, written without the code under test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mambalm.data.token_files import METADATA, Metadata, Shard, content_hash


def write_folder(
    folder: Path, shards: Sequence[Sequence[Sequence[int]]], *, vocab_size: int = 50_000, hashes: bool = True
) -> Path:
    """A folder with these shards of documents of tokens."""
    folder.mkdir(parents=True)
    noted = []
    dtype = "<u2" if vocab_size <= 65_536 else "<u4"
    for number, documents in enumerate(shards):
        name = f"{number:05d}.ds"
        tokens = np.array([token for document in documents for token in document], dtype)
        (folder / name).write_bytes(tokens.tobytes())
        (folder / f"{name}.index").write_bytes(np.cumsum([len(d) for d in documents]).astype("<u8").tobytes())
        if hashes:
            values = np.array([content_hash(np.array(d)) for d in documents], "<u8")
            (folder / f"{name}.hash").write_bytes(values.tobytes())
        sha = hashlib.sha256(tokens.tobytes()).hexdigest()
        noted.append(Shard(name, len(documents), len(tokens), 4 * len(tokens), int(max(tokens, default=-1)), sha, ""))
    metadata = Metadata(vocab_size, "none", "0" * 16, 0, tuple(noted))
    (folder / METADATA).write_text(metadata.to_json())
    return folder


def counting(lengths: Sequence[Sequence[int]], first: int = 1) -> list[list[list[int]]]:
    """Shards of documents of these lengths, whose tokens count on from ``first``."""
    shards = []
    for shard in lengths:
        shards.append([list(range(first + sum(shard[:i]), first + sum(shard[: i + 1]))) for i in range(len(shard))])
        first += sum(shard)
    return shards
