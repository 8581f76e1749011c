"""Where documents lie in a batch, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambalm.models.padding import Packing, find_packing

ROWS = torch.arange(1, 9).view(2, 4)


def packing(**given: Any) -> Packing:
    found = find_packing((2, 4), **{name: torch.tensor(value) for name, value in given.items()})
    assert found is not None
    return found


def test_padding_is_left_out_and_put_back_as_zeros() -> None:
    found = packing(attention_mask=[[0, 1, 1, 1], [1, 0, 0, 0]])
    assert found.cu_seqlens.tolist() == [0, 3, 4]
    assert found.cu_seqlens.dtype == torch.int32
    assert found.lengths.tolist() == [3, 1]
    assert found.gather(ROWS).tolist() == [[2, 3, 4, 5]]
    assert found.scatter(found.gather(ROWS)).tolist() == [[0, 2, 3, 4], [5, 0, 0, 0]]
    assert found.scatter(torch.ones(1, 4, 2)).sum(-1).tolist() == [[0, 2, 2, 2], [2, 0, 0, 0]]


def test_the_first_token_of_a_document_is_no_target() -> None:
    found = packing(attention_mask=[[0, 1, 1, 1], [1, 0, 0, 0]])
    assert found.targets(ROWS, -100).tolist() == [[-100, 3, 4, -100]]
    empty = Packing(torch.tensor([0, 0, 2, 2, 4, 4], dtype=torch.int32), (1, 4))
    assert empty.targets(ROWS[:1], -1).tolist() == [[-1, 2, -1, 4]]


def test_a_mask_of_nothing_but_ones_is_none() -> None:
    ones = torch.ones(2, 4)
    assert find_packing((2, 4), attention_mask=ones) is None
    assert find_packing((2, 4)) is None
    # What stands before the input was padded when it was read, and says nothing about it.
    assert find_packing((2, 4), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])) is None


def test_a_row_of_padding_is_an_empty_document() -> None:
    found = packing(attention_mask=[[1, 1, 1, 1], [0, 0, 0, 0]])
    assert found.lengths.tolist() == [4, 0]
    nothing = packing(attention_mask=[[0] * 4] * 2)
    assert nothing.gather(ROWS).shape == (1, 0)
    assert nothing.scatter(nothing.gather(ROWS)).tolist() == [[0] * 4] * 2


def test_positions_that_restart() -> None:
    found = packing(position_ids=[[0, 1, 0, 1], [7, 8, 9, 0]], attention_mask=[[1] * 4] * 2)
    assert found.cu_seqlens.tolist() == [0, 2, 4, 7, 8]
    assert found.scatter(found.gather(ROWS)).tolist() == ROWS.tolist()
    both = packing(position_ids=[[0, 0, 1, 2]])
    assert both.cu_seqlens.tolist() == [0, 1, 4, 5, 8]
    assert find_packing((2, 4), position_ids=torch.arange(5, 9)[None]) is None
    assert find_packing((2, 1), position_ids=torch.tensor([[3], [5]])) is None


def test_generates_numbering_of_padded_rows_is_not_taken_for_documents() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = find_packing((2, 4), attention_mask=mask, position_ids=positions)
    assert found is not None
    assert found.cu_seqlens.tolist() == [0, 2, 6]


def test_offsets_are_taken_as_they_are() -> None:
    found = find_packing((1, 4), cu_seqlens=torch.tensor([0, 1, 1, 4]), attention_mask=torch.ones(1, 4))
    assert found is not None
    assert found.cu_seqlens.tolist() == [0, 1, 1, 4]
    assert found.cu_seqlens.dtype == torch.int32
    with pytest.raises(ValueError, match="integers"):
        find_packing((1, 4), cu_seqlens=torch.tensor([0.0, 4.0]))
