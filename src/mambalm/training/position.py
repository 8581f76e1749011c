"""Where a run is, and the data that it reads there."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mambalm.data.mixture import MixedStream, open_stream
from mambalm.data.samples import Batch, collate
from mambalm.training.distributed import Ranks
from mambalm.training.model import require_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mambalm.training.recipe import Recipe


@dataclass
class Position:
    """What a run has done.

    Attributes:
        step: optimisation steps applied.
        tokens: learned from, in all; ``stage_tokens`` of them in this stage.
        stage: its number.
        sequences: read in this stage, those of steps that were left out as well: the place in the data.
        taken: what earlier stages have taken of each source.
        seconds: of training.
    """

    step: int = 0
    tokens: int = 0
    stage: int = 0
    stage_tokens: int = 0
    sequences: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Reader:
    """Batches of a stage by position, the next one read ahead in a thread."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ranks: Ranks) -> None:
        """Read for one of ``ranks``, for a model of ``vocab_size`` tokens."""
        self._recipe, self._tokenizer, self._vocab_size, self._ranks = recipe, tokenizer, vocab_size, ranks
        self._streams: dict[int, MixedStream] = {}
        self._pool = ThreadPoolExecutor(1)
        self._ahead: tuple[tuple[int, int, int], Future[list[Batch]]] | None = None

    def stream(self, stage: int, taken: Mapping[str, int], split: Any = "train") -> MixedStream:
        """The samples of a stage, after what earlier ones have taken.

        Raises:
            ValueError: the token files are not there, or do not fit tokenizer or model.
        """
        section = self._recipe.stages[stage]
        stream = open_stream(
            self._recipe.data_of(stage).mixture(),
            length=section.context,
            tokenizer=self._tokenizer,
            split=split,
            seed=self._recipe.seed,
            granule=self._recipe.longest_context,
            after=taken,
        )
        require_vocabulary(self._vocab_size, stream.vocab_size, "the token files' tokenizer")
        return stream

    def open(self, position: Position) -> None:
        """Make ready to read the stage of a position.

        Raises:
            ValueError: as `stream`.
        """
        if position.stage not in self._streams:
            self._streams = {position.stage: self.stream(position.stage, position.taken)}

    def read(self, position: Position, batch: int) -> list[Batch]:
        """This rank's micro-batches of the batch at a position.

        Raises:
            ValueError: the batch cannot be divided among the ranks.
        """
        key = (position.stage, position.sequences, batch)
        self.open(position)
        ahead, self._ahead = self._ahead, None
        return ahead[1].result() if ahead is not None and ahead[0] == key else self._read(*key)

    def read_ahead(self, position: Position, batch: int) -> None:
        """Begin to read the batch behind that of a position.

        To be called when the step is launched: while it was, this thread would have competed for the interpreter.
        """
        key = (position.stage, position.sequences + batch, batch)
        self._ahead = (key, self._pool.submit(self._read, *key))

    def forget(self) -> None:
        """After a jump to another position."""
        self._streams, self._ahead = {}, None

    def taken(self, position: Position) -> dict[str, int]:
        """What has been taken of each source when this stage ends here."""
        return position.taken | self._streams[position.stage].taken(position.sequences)

    def _read(self, stage: int, first: int, batch: int) -> list[Batch]:
        world, device = self._ranks.world, self._ranks.device
        if batch % world:
            name = self._recipe.stages[stage].name
            raise ValueError(f"stage {name}: a batch of {batch} sequences cannot be divided among {world} ranks")
        stream, micro = self._streams[stage], self._recipe.stages[stage].micro_batch
        begin = first + batch // world * self._ranks.rank
        end = begin + batch // world
        pinned = device.type != "cpu"
        if pinned:
            # A thread begins on the first device, where every rank would make a context.
            torch.accelerator.set_device_index(device.index or 0)
        groups = (range(first, min(first + micro, end)) for first in range(begin, end, micro))
        return [collate([stream[i] for i in group], pinned=pinned) for group in groups]
