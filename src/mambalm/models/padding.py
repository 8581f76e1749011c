"""Rows of a batch as documents laid end to end: padding is removed before the layers and put back after them.

The layers and the ops know no mask. A padded batch (b, l) with T real tokens becomes one row (1, T) with `cu_seqlens`,
b documents and one initial state per row, so a padded row gives exactly what it gives alone, and padding costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Packing:
    """Where the documents of a batch (b, l) lie once they are laid end to end.

    Attributes:
        cu_seqlens: (s+1) int32, where each document begins; the first is 0 and the last T, the number of tokens.
        shape: (b, l) of the batch.
        tokens: (T) int64, the index of each token in the flattened batch; None when every position is one.
    """

    cu_seqlens: torch.Tensor
    shape: tuple[int, int]
    tokens: torch.Tensor | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each document, (s) int64."""
        return self.cu_seqlens.diff().long()

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(b, l, ...) to the packed row (1, T, ...)."""
        flat = x.flatten(0, 1)
        return (flat if self.tokens is None else flat.index_select(0, self.tokens)).unsqueeze(0)

    def scatter(self, packed: torch.Tensor) -> torch.Tensor:
        """The packed row (1, T, ...) to (b, l, ...), zero at the padding."""
        flat = packed.squeeze(0)
        if self.tokens is not None:
            rows = self.shape[0] * self.shape[1]
            flat = flat.new_zeros(rows, *flat.shape[1:]).index_copy(0, self.tokens, flat)
        return flat.unflatten(0, self.shape)

    def targets(self, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
        """Labels (b, l) to (1, T), without those of each document's first token, which nothing before it predicts."""
        labels = self.gather(labels)
        # One place more than there are tokens, for the documents that begin at the end because they are empty.
        first = labels.new_zeros(labels.shape[1] + 1, dtype=torch.bool)
        first = first.index_fill(0, self.cu_seqlens.long(), True)[:-1]
        return labels.masked_fill(first, ignore_index)


def find_packing(
    shape: tuple[int, int],
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Packing | None:
    """How a batch of `shape` (b, l) is to be packed, or None when each row is one document without padding.

    Args:
        attention_mask: (b, m) with m ≥ l, its last l columns are taken; 0 marks padding, anywhere in a row.
        position_ids: (b, l) or (1, l); a position that does not follow the one before it begins a document, as in
            transformers. Not read where a mask with padding is given: `generate` numbers padded rows itself.
        cu_seqlens: (s+1) integers, where documents begin in a batch of one row.

    Raises:
        ValueError: a shape that does not fit, padding together with `cu_seqlens`.
    """
    padding = None if attention_mask is None else _padding(attention_mask, shape)
    if cu_seqlens is not None:
        if padding is not None:
            raise ValueError("cu_seqlens and an attention_mask with padding exclude each other: give one of them")
        return Packing(_checked_offsets(cu_seqlens, shape), shape)
    if padding is not None:
        return padding
    # One token follows nothing, and one position per row says nothing about documents.
    if position_ids is None or shape[1] < 2:
        return None
    return _restarts(position_ids, shape)


def _checked_offsets(cu_seqlens: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    if shape[0] != 1:
        raise ValueError(f"cu_seqlens wants a batch of one row, got {shape[0]} rows: lay the documents end to end")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, expected (s+1) integers, s ≥ 1")
    return cu_seqlens.to(torch.int32)


# How many documents and tokens there are is data: under torch.compile this breaks the graph, and fullgraph refuses.
_read_as_data = torch.compiler.disable(
    reason="a mask or position_ids are read as data: call the model without them (unpadded) or with cu_seqlens"
)


@_read_as_data
def _padding(mask: torch.Tensor, shape: tuple[int, int]) -> Packing | None:
    rows, length = shape
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < length:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, expected ({rows}, {length}), or longer to the left")
    real = mask[:, mask.shape[1] - length :] != 0
    if bool(real.all()):
        return None
    offsets = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Packing(offsets, shape, tokens=real.flatten().nonzero().squeeze(1))


@_read_as_data
def _restarts(position_ids: torch.Tensor, shape: tuple[int, int]) -> Packing | None:
    rows, length = shape
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, rows) or position_ids.shape[1] != length:
        raise ValueError(f"position_ids is {tuple(position_ids.shape)}, expected ({rows}, {length}) or (1, {length})")
    restart = position_ids.diff(dim=1) != 1
    if not bool(restart.any()):
        return None
    begins = F.pad(restart, (1, 0), value=True).expand(rows, length).flatten()
    offsets = F.pad(begins.nonzero().squeeze(1), (0, 1), value=rows * length)
    return Packing(offsets.to(torch.int32), shape)
