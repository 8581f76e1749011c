"""The step that writes token files in a datatrove pipeline, on Slurm, Ray or here: docs/data.md shows the script."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambalm.data.shards import encode_texts, write_shard
from mambalm.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class WriteTokens:
    """The last step of a pipeline: one token file per task, which appears when it is complete.

    `mambalm tokenize --collect` describes the files when all tasks are through.

    Attributes:
        folder: shared by all tasks.
        tokenizer: a folder, or a name on the Hub.
    """

    folder: str
    tokenizer: str

    def __call__(self, documents: Iterable[Any], rank: int = 0, world_size: int = 1) -> None:
        """Write the documents of task ``rank``, as datatrove calls a step.

        Raises:
            ValueError: the tokenizer has no end-of-text token.
        """
        tokenizer = load_tokenizer(self.tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{self.tokenizer} has no end-of-text token to stand between documents: set its eos_token")
        texts = (document.text for document in documents)
        batches = encode_texts(tokenizer, texts, tokenizer.eos_token_id)
        write_shard(Path(self.folder), f"{rank:06d}.ds", batches, len(tokenizer))
