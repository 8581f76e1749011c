"""How portable lays documents of any lengths out: side by side as rows of equal chunks, a segment at a time.

A row that has ended is filled up with steps of size zero. They decay nothing and add nothing, so that the state after
the last chunk is the state at the document's end, wherever in the chunk that was.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The next k chunks of q tokens of each of r documents; a token is a position in the flattened (b l) axis."""

    tokens: Tensor  # (r k q); of the filling, any token
    real: Tensor | None  # (r k q), False for the filling; None if there is none
    filled: Tensor | None  # the real ones' places in (r k q)
    shape: tuple[int, int, int]

    def take(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The segment (r, k, q, ...) of ``t`` (b l, ...), the filling zero."""
        values = t.index_select(0, self.tokens).to(dtype)
        if self.real is not None:
            values.masked_fill_(~self.real.view(-1, *[1] * (t.ndim - 1)), 0)
        return values.unflatten(0, self.shape)

    def put(self, t: Tensor, values: Tensor) -> None:
        """Write the segment's ``values`` (r, k, q, ...) into ``t`` (b, l, ...), which is contiguous."""
        values, tokens = values.to(t.dtype).flatten(0, 2), self.tokens
        if self.filled is not None:
            values, tokens = values[self.filled], tokens[self.filled]
        t.flatten(0, 1).index_copy_(0, tokens, values)


@dataclass(frozen=True)
class Block:
    """Documents of similar lengths, computed side by side."""

    rows: Tensor | slice  # which documents
    segments: list[Segment]


def blocks(edges: Sequence[int], chunk: int, budget: int, device: torch.device) -> Iterator[Block]:
    """The non-empty documents between ``edges``, in blocks of ``budget`` tokens or of one chunk of one document.

    The shortest document of a block has more than half the length of its longest: filling costs about a factor of two
    at worst, and the number of blocks grows with the tokens and not with the documents.
    """
    lengths = [end - begin for begin, end in itertools.pairwise(edges)]
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    while order:
        longest = lengths[order[0]]
        count = -(-longest // chunk)
        size = -(-longest // count)  # equal chunks: little filling in the last one
        most = max(budget // size, 1)
        rows = [row for row in order[:most] if 2 * lengths[row] > longest]
        order = order[len(rows) :]
        begins, ends = torch.tensor([[[edges[row]], [edges[row + 1]]] for row in rows]).unbind(1)
        step = max(budget // (size * len(rows)), 1)
        segments = [
            _segment(begins, ends, begin * size, min(step, count - begin), size, device)
            for begin in range(0, count, step)
        ]
        neighbours = rows == list(range(rows[0], rows[0] + len(rows)))  # their states need no copy
        yield Block(slice(rows[0], rows[0] + len(rows)) if neighbours else torch.tensor(rows).to(device), segments)


def _segment(begins: Tensor, ends: Tensor, offset: int, chunks: int, size: int, device: torch.device) -> Segment:
    tokens = begins + torch.arange(offset, offset + chunks * size)
    real = tokens < ends
    shape = (len(tokens), chunks, size)
    if bool(real.all()):
        return Segment(tokens.flatten().to(device), None, None, shape)
    tokens, real = torch.where(real, tokens, begins).flatten(), real.flatten()
    return Segment(tokens.to(device), real.to(device), real.nonzero()[:, 0].to(device), shape)
