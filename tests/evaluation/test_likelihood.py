"""Log-likelihoods beside a float64 pass over each text, whatever is shared; and that what is shared is read once."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from mambalm.evaluation import likelihood, shared_prefixes
from mambalm.evaluation.likelihood import Likelihood, likelihoods
from mambalm.evaluation.shared_prefixes import Tokens, groups, shared_batches
from mambalm.generation import Engine
from mambalm.models.common import MambalmForCausalLM
from tests.models.tiny import FAMILIES, lively, tokens


def drawn(length: int, seed: int) -> Tokens:
    return tuple(tokens(length, seed=seed).tolist())


# Questions behind the same examples, behind others, and behind none; several continuations of each, some long.
EXAMPLES, OTHERS = drawn(50, 1), drawn(41, 2)
CONTEXTS = [EXAMPLES + drawn(3, 3), OTHERS + drawn(7, 4), EXAMPLES + drawn(6, 5), drawn(1, 6), EXAMPLES + drawn(3, 3)]
CONTEXTS += [OTHERS, EXAMPLES, drawn(9, 7)]
PAIRS = [(context, drawn(length, 10 + length)) for context in CONTEXTS for length in (1, 2, 33)]


def by_hand(model: MambalmForCausalLM, context: Tokens, continuation: Tokens) -> Likelihood:
    """From one pass over all of the text, in float64."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    logprob = logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
    return Likelihood(logprob, bool((logits.argmax(-1) == wanted).all()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_equals_a_pass_over_each_text(family: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Few logits at once, so that long continuations are read in pieces.
    monkeypatch.setattr(likelihood, "_LOGITS", 48 * 4 * batch_size)
    model = lively(family)
    found = dict(likelihoods(Engine(model), PAIRS, batch_size))
    assert sorted(found) == list(range(len(PAIRS)))
    for index, pair in enumerate(PAIRS):
        expected = by_hand(model, *pair)
        assert found[index].logprob == pytest.approx(expected.logprob, rel=1e-5), pair
        assert found[index].is_greedy == expected.is_greedy


def test_what_a_model_would_write_is_greedy() -> None:
    model = lively("mamba")
    context = drawn(5, 1)
    written = model.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False)[0, 5:].tolist()
    other = (*written[:-1], (written[-1] + 1) % 48)
    found = dict(likelihoods(Engine(model), [(context, tuple(written)), (context, other)]))
    assert [found[index].is_greedy for index in range(2)] == [True, False]


def test_each_beginning_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively("mamba")
    read: list[int] = []
    forward = type(model).forward

    def counted(self: Any, input_ids: torch.Tensor, attention_mask: Any = None, **arguments: Any) -> Any:
        read.append(int(input_ids.numel() if attention_mask is None else attention_mask.sum()))
        return forward(self, input_ids, attention_mask=attention_mask, **arguments)

    monkeypatch.setattr(type(model), "forward", counted)
    pairs = [(EXAMPLES + drawn(3, seed), drawn(2, seed)) for seed in range(20, 30)]
    dict(likelihoods(Engine(model), pairs, batch_size=4))
    # The examples; behind them the questions; of each continuation of two tokens the first.
    assert sum(read) == 50 + 10 * 3 + 10 * 1
    assert len(read) == 1 + 2 * 3


def test_groups_save_what_they_can() -> None:
    head, other = drawn(40, 1), drawn(40, 2)
    prompts = [(*head, *other, 1), (*head, 5), (*head, *other, 2), (7, 8, 9), (*head, *other, 3), head[:34], (7, 8, 10)]
    found = {frozenset(group.numbers): group.shared for group in groups(prompts)}
    # With head[:34] and (*head, 5) all would share 33 tokens: 4 times 33 saved, and now 2 times 80.
    assert {numbers: shared for numbers, shared in found.items() if 0 in numbers} == {frozenset({0, 2, 4}): 80}
    assert found[frozenset({3})] == found[frozenset({6})] == 0
    assert sorted(number for numbers in found for number in numbers) == list(range(7))
    more = [*prompts, *((*head, 6 + i) for i in range(9))]
    assert max(groups(more), key=lambda group: len(group.numbers)).shared == 40, "now those save more"
    assert groups([head, head]) == [([0, 1], 39)]
    assert groups([head]) == [([0], 0)]
    assert groups([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_no_other_groups_save_more(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefixes, "_WORTH", 1)
    draw = random.Random(seed)
    prompts = [tuple(draw.choices((1, 2), k=draw.randint(1, 6))) for _ in range(draw.randint(1, 9))]
    found = groups(prompts)
    assert sorted(number for group in found for number in group.numbers) == list(range(len(prompts)))
    for numbers, shared in found:
        assert all(len(prompts[number]) > shared for number in numbers)
        assert len({prompts[number][:shared] for number in numbers}) == 1
    ordered = sorted(prompts)

    def saved(first: int, last: int) -> int:
        members = ordered[first:last]
        most = min(map(len, members)) - 1
        shared = next((n for n in range(most, 0, -1) if len({member[:n] for member in members}) == 1), 0)
        return shared * (len(members) - 1)

    best = [0]
    for last in range(1, len(ordered) + 1):
        best.append(max(best[first] + saved(first, last) for first in range(last)))
    assert sum(shared * (len(numbers) - 1) for numbers, shared in found) == best[-1]


def test_a_text_that_grows_token_by_token() -> None:
    text = drawn(3000, 1)
    found = groups([text[:length] for length in range(1, len(text))])
    assert sum(len(group.numbers) for group in found) == len(text) - 1


def test_rows_are_the_prompts_again() -> None:
    model = lively("mamba")
    prompts = [context for context, _ in PAIRS]
    seen = {}
    for rows in shared_batches(Engine(model), prompts, 4):
        assert len(rows.numbers) <= 4
        before = [0] * len(rows.rests) if rows.state is None else rows.state.position.tolist()
        for number, rest, position in zip(rows.numbers, rows.rests, before, strict=True):
            assert number not in seen
            assert tuple(rest.tolist()) == prompts[number][position:] != ()
            seen[number] = position
    assert sorted(seen) == list(range(len(prompts)))
    assert {0, 40} < set(seen.values()), "examples were shared"


def test_what_cannot_be_scored_is_refused() -> None:
    engine = Engine(lively("mamba"))
    for pair, message in (
        (((), (1,)), "pair 1 has no tokens in its context"),
        (((1,), ()), "pair 1 has no tokens in its continuation"),
        (((1,), (48,)), "pair 1 has token 48, but the model's vocabulary has 48"),
        (((48,), (1,)), "token ids from 48 to 48"),
    ):
        with pytest.raises(ValueError, match=message):
            dict(likelihoods(engine, [pair]))
