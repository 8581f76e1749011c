"""Sampling, by hand-computed cases, by properties, and beside transformers' logits processors."""

from __future__ import annotations

from dataclasses import replace

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

from mambalm.generation import sampling
from mambalm.generation.sampling import (
    Chooser,
    Sampling,
    keep_likeliest,
    keep_min_p,
    keys,
    penalize_counts,
    penalize_repetition,
    race_times,
)

PROBABILITIES = torch.tensor([[0.1, 0.5, 0.15, 0.25]])


def kept(logits: Tensor) -> list[int]:
    return (logits[0] > -torch.inf).nonzero().flatten().tolist()


def chooser(logits: Tensor, sampling: Sampling, seed: int = 0, logprobs: int | None = None) -> Chooser:
    seeds = [seed + row for row in range(len(logits))]
    seen = torch.zeros_like(logits, dtype=torch.bool)
    return Chooser.of([sampling] * len(logits), seeds, seen, device=logits.device, logprobs=logprobs)


def draw(logits: Tensor, sampling: Sampling, seed: int = 0) -> list[int]:
    return chooser(logits, sampling, seed)(logits).tokens.tolist()


@pytest.mark.parametrize(
    ("k", "expected"), [(0, [0, 1, 2, 3]), (1, [1]), (2, [1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k(k: int, expected: list[int]) -> None:
    assert kept(keep_likeliest(PROBABILITIES.log(), k=k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, [1]), (0.01, [1]), (0.49, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p(p: float, expected: list[int]) -> None:
    assert kept(keep_likeliest(PROBABILITIES.log(), p=p)) == expected


def test_top_p_keeps_no_more_than_reach_it() -> None:
    assert kept(keep_likeliest(torch.zeros(1, 4), p=0.5)) == [0, 1]


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, [0, 1, 2, 3]), (0.25, [1, 2, 3]), (0.4, [1, 3]), (0.6, [1]), (1.0, [1])]
)
def test_min_p_is_relative_to_the_largest_probability_wherever_it_stands(p: float, expected: list[int]) -> None:
    assert kept(keep_min_p(PROBABILITIES.log(), p)) == expected


def test_min_p_acts_whatever_top_k_is() -> None:
    logits = PROBABILITIES.log().repeat(300, 1)
    for top_k in (0, 3, 4):
        assert set(draw(logits, Sampling(temperature=1, top_k=top_k, min_p=0.4))) == {1, 3}


def test_min_p_comes_behind_top_p() -> None:
    """As in transformers: the other way round the third token would be lost."""
    logits = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]).log().repeat(300, 1)
    assert set(draw(logits, Sampling(temperature=1.0, top_p=0.8, min_p=0.3))) == {0, 1, 2}


def test_repetition_penalty_moves_both_signs_down_and_only_tokens_seen() -> None:
    logits, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


@given(seed=st.integers(0, 999), k=st.integers(1, 12), p=st.floats(0.05, 0.95), vocabulary=st.integers(2, 12))
def test_filters_keep_what_those_of_transformers_keep(seed: int, k: int, p: float, vocabulary: int) -> None:
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed))
    ids = torch.randint(vocabulary, (3, 4), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(keep_likeliest(logits, k=k), TopKLogitsWarper(k)(ids, logits))
    assert torch.equal(keep_likeliest(logits, p=p), TopPLogitsWarper(p)(ids, logits))
    both = TopPLogitsWarper(p)(ids, TopKLogitsWarper(k)(ids, logits))
    assert torch.equal(keep_likeliest(logits, k, p), both)
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
    alone = [draw(logits[i : i + 1], sampling, seed=i)[0] for i in range(4)]
    assert draw(logits, sampling) == alone


def test_rows_of_one_batch_sample_in_their_own_ways() -> None:
    logits = torch.randn(4, 50)
    ways = [Sampling(), Sampling(temperature=2.0), Sampling(temperature=2.0, top_k=3), Sampling(repetition_penalty=9.0)]
    seen = logits > 0
    together = Chooser.of(ways, range(4), seen, device=logits.device)
    for _ in range(5):
        chosen = together(logits).tokens
    for row, way in enumerate(ways):
        alone = Chooser.of([way], [row], seen[row : row + 1], device=logits.device)
        for _ in range(5):
            one = alone(logits[row : row + 1]).tokens
        assert one == chosen[row]


def test_chosen_rows_go_on_as_the_same_rows() -> None:
    """With ways, seeds and counts of their own, and some steps apart."""
    ways = [
        Sampling(temperature=2.0),
        Sampling(temperature=1.0, top_k=5, repetition_penalty=3.0),
        Sampling(temperature=4.0, frequency_penalty=1.0, min_p=0.1),
    ]
    logits = torch.randn(3, 50)

    def of(rows: list[int]) -> Chooser:
        made = Chooser.of([ways[row] for row in rows], rows, logits[rows] > 1, device=logits.device)
        made.steps += torch.tensor(rows)
        return made

    alone, together, rows = [of([row]) for row in range(3)], of([0, 1, 2]), [0, 1, 2]
    for kept in ([0, 1, 2], [2, 1], [0]):
        together, rows = together.index(torch.tensor(kept)), [rows[place] for place in kept]
        for _ in range(4):
            expected = [int(alone[row](logits[row : row + 1]).tokens) for row in rows]
            assert together(logits[rows]).tokens.tolist() == expected


def test_steps_and_seeds_draw_anew() -> None:
    logits = torch.zeros(1, 1000)
    sampler = chooser(logits, Sampling(temperature=1))
    drawn = [sampler(logits).tokens.item() for _ in range(20)]
    others = [draw(logits, Sampling(temperature=1), seed)[0] for seed in range(1, 21)]
    assert len({*drawn}) > 15
    assert len({*others}) > 15
    assert drawn != others


def test_race_times_are_exponential_and_independent_of_the_vocabulary() -> None:
    times = race_times(keys([3]), torch.tensor([2]), 200_000)[0]
    ordered = times.sort().values.double()
    exact = 1 - torch.exp(-ordered)
    empirical = torch.arange(1, len(ordered) + 1) / len(ordered)
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed once in a thousand draws.
    assert (exact - empirical).abs().max() < 1.95 / len(ordered) ** 0.5
    assert abs(torch.corrcoef(torch.stack([times[1:], times[:-1]]))[0, 1]) < 0.01
    assert torch.equal(times[:100], race_times(keys([3]), torch.tensor([2]), 100)[0])
    assert (times > 0).all()


def test_a_token_that_is_alone_is_drawn_by_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    for bits in (0, -1):  # the least and the largest number
        monkeypatch.setattr(sampling, "_mixed", lambda x, bits=bits: torch.full_like(x, bits))
        assert race_times(keys([3]), torch.tensor([0]), 3).isfinite().all()
        assert chooser(logits, Sampling(temperature=1.0, top_k=1))(logits).tokens.tolist() == [1]


def test_keys_are_those_of_splitmix64() -> None:
    # The first output of the published generator for seeds 0 and 1234567.
    assert [key % 2**64 for key in keys([0, 1234567]).tolist()] == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_penalties_of_what_was_written() -> None:
    logits, written = torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[3, 1, 0]])
    assert penalize_counts(logits, written, 0.5, 0.25).tolist() == [[0.75, -2.75, 1.0]]


def test_a_chooser_counts_what_it_chose() -> None:
    logits = torch.tensor([[1.0, 0.5, 0.0]])
    sampler = chooser(logits, Sampling(presence_penalty=0.4, frequency_penalty=0.3))
    # 1.0 .5 0 | .3 .5 0 | .3 -.2 0 | 0 (twice) -.2 0: a tie goes to the first
    assert [sampler(logits).tokens.item() for _ in range(4)] == [0, 1, 0, 0]
    assert sampler.written is not None
    assert sampler.written.tolist() == [[3, 1, 0]]


def test_what_the_caller_says_was_seen_stays_the_callers() -> None:
    seen = torch.zeros(1, 4, dtype=torch.bool)
    sampler = Chooser.of([Sampling(repetition_penalty=2.0)], [0], seen, device=seen.device)
    sampler(PROBABILITIES.log())
    assert sampler.seen is not None
    assert sampler.seen.any()
    assert not seen.any()


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(2, 6)
    choice = chooser(logits, Sampling(temperature=3.0, repetition_penalty=5.0), logprobs=2)(logits)
    exact = logits.double().log_softmax(-1)
    assert choice.logprobs is not None
    assert choice.likeliest is not None
    expected = torch.cat([exact.gather(1, choice.tokens[:, None]), exact.topk(2).values], 1)
    assert torch.allclose(choice.logprobs.double(), expected, atol=1e-6)
    assert torch.equal(choice.likeliest, exact.topk(2).indices)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": torch.nan},
        {"temperature": torch.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": torch.inf},
        {"repetition_penalty": 1e-46},
        {"presence_penalty": torch.inf},
        {"presence_penalty": torch.nan},
        {"frequency_penalty": -torch.inf},
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, float]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"{name} is {value}; it must be"):
        Sampling(**wrong)


@pytest.mark.parametrize("temperature", [1e-20, 1e-37, 1e-39, 1e-44, 1e-300])
def test_however_cold_the_likeliest_is_drawn(temperature: float) -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 4.9], [-200.0, -5.0, -100.0, -4.0]])
    for way in ({}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}, {"repetition_penalty": 1.3}):
        assert draw(logits, Sampling(temperature=temperature, **way)) == [1, 3]  # type: ignore[arg-type]


def test_k_above_any_vocabulary_keeps_all() -> None:
    logits = PROBABILITIES.log().repeat(300, 1)
    for top_k in (5, 2**24 + 1, 2**63, 10**40):
        assert set(draw(logits, Sampling(temperature=1.0, top_k=top_k))) == {0, 1, 2, 3}


@pytest.mark.parametrize("way", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=2, top_p=0.9)])
@pytest.mark.parametrize("row", [[1.0, torch.nan, 2.0], [1.0, torch.inf, 2.0], [-torch.inf] * 3])
def test_logits_that_are_no_numbers_give_no_token(row: list[float], way: Sampling) -> None:
    sampler = chooser(torch.zeros(3, 3), replace(way, presence_penalty=0.1))
    good = [-torch.inf, 2.0, -torch.inf]
    assert sampler(torch.tensor([good, row, good])).tokens.tolist() == [1, sampling.NO_TOKEN, 1]
    assert sampler(torch.tensor([good, good, row])).tokens.tolist() == [1, 1, sampling.NO_TOKEN]


@pytest.mark.parametrize(
    "way",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0, "top_k": 4},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.2, "min_p": 0.2},
        {"temperature": 1.5, "repetition_penalty": 1.4},
    ],
)
def test_draws_over_rows_and_steps_pass_chi_square(way: dict[str, float]) -> None:
    """Neighbouring seeds and neighbouring steps together, so that streams that repeat one another would show."""
    logits = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, -0.5, 1.9, 0.7])
    seen = torch.arange(8) % 3 == 0
    ids = seen.nonzero().T
    expected = logits[None].clone()
    expected = RepetitionPenaltyLogitsProcessor(way.get("repetition_penalty", 1.0))(ids, expected) / way["temperature"]
    expected = TopKLogitsWarper(int(way.get("top_k", 8)))(ids, expected)
    expected = TopPLogitsWarper(way.get("top_p", 1.0))(ids, expected)
    expected = MinPLogitsWarper(way.get("min_p", 0.0))(ids, expected).double().softmax(-1)[0]
    rows, steps = 500, 40
    sampler = Chooser.of(
        [Sampling(**way)] * rows,  # type: ignore[arg-type]
        range(rows),
        seen.repeat(rows, 1),
        device=logits.device,
    )
    counts = torch.zeros(8, dtype=torch.int64)
    for _ in range(steps):
        if sampler.seen is not None:
            sampler.seen.copy_(seen)
        counts += sampler(logits.expand(rows, -1)).tokens.bincount(minlength=8)
    kept = expected > 0
    assert not counts[~kept].any()
    statistic = float(((counts - rows * steps * expected)[kept] ** 2 / (rows * steps * expected[kept])).sum())
    # Passed once in ten thousand draws by 7 degrees of freedom, and more rarely by fewer.
    assert statistic < 29.9
