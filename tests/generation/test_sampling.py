"""Sampling, by hand-computed cases, by properties, and beside transformers' logits processors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mambalm.generation.sampling import Sampling, choose, keep_min_p, keep_top_k, keep_top_p, penalize_repetition

PROBABILITIES = torch.tensor([[0.1, 0.5, 0.15, 0.25]])


def kept(logits: Tensor) -> list[int]:
    return (logits[0] > -torch.inf).nonzero().flatten().tolist()


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


def draw(logits: Tensor, sampling: Sampling, seed: int = 0) -> list[int]:
    seen = torch.zeros_like(logits, dtype=torch.bool)
    return choose(logits, sampling, seen, generators(len(logits), seed)).tolist()


@pytest.mark.parametrize(
    ("k", "expected"), [(0, [0, 1, 2, 3]), (1, [1]), (2, [1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k(k: int, expected: list[int]) -> None:
    assert kept(keep_top_k(PROBABILITIES.log(), k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.01, [1]), (0.49, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p(p: float, expected: list[int]) -> None:
    assert kept(keep_top_p(PROBABILITIES.log(), p)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, [0, 1, 2, 3]), (0.25, [1, 2, 3]), (0.4, [1, 3]), (0.6, [1]), (1.0, [1])]
)
def test_min_p_is_relative_to_the_largest_probability_wherever_it_stands(p: float, expected: list[int]) -> None:
    assert kept(keep_min_p(PROBABILITIES.log(), p)) == expected


def test_min_p_acts_whatever_top_k_is() -> None:
    logits = PROBABILITIES.log().repeat(300, 1)
    for top_k in (0, 3, 4):
        assert set(draw(logits, Sampling(temperature=1, top_k=top_k, min_p=0.4))) == {1, 3}


def test_repetition_penalty_moves_both_signs_down_and_only_tokens_seen() -> None:
    logits, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


@given(seed=st.integers(0, 999), k=st.integers(1, 12), p=st.floats(0.05, 0.95), vocabulary=st.integers(2, 12))
def test_filters_keep_what_those_of_transformers_keep(seed: int, k: int, p: float, vocabulary: int) -> None:
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed))
    ids = torch.randint(vocabulary, (3, 4), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(ids, logits))
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(ids, logits))
    assert torch.equal(keep_min_p(logits, p), MinPLogitsWarper(p)(ids, logits))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    assert torch.allclose(penalize_repetition(logits, seen, 1.3), expected)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(PROBABILITIES.log(), Sampling(temperature=0, top_k=3, min_p=0.9)) == [1]


def test_draws_follow_the_probabilities() -> None:
    drawn = torch.tensor(draw(PROBABILITIES.log().repeat(4000, 1), Sampling(temperature=1)))
    shares = drawn.bincount(minlength=4) / 4000
    # Four standard deviations of a share, sqrt(p (1 - p) / 4000), are below 0.032.
    assert torch.allclose(shares, PROBABILITIES[0], atol=0.032)


def test_a_row_draws_the_same_whoever_is_beside_it() -> None:
    logits = torch.randn(4, 50)
    sampling = Sampling(temperature=1.5)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    together = choose(logits, sampling, seen, generators(4)).tolist()
    alone = [choose(logits[i : i + 1], sampling, seen[:1], [generators(4)[i]]).item() for i in range(4)]
    assert together == alone


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.5}, {"repetition_penalty": 0.0}],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, float]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"{name} is {value}; it must be"):
        Sampling(**wrong)
