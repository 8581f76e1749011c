"""Log-likelihoods on a GPU, where short prompts are read by captured graphs: those of float64 on the CPU."""

from __future__ import annotations

import pytest

from mambalm.evaluation.likelihood import likelihoods
from mambalm.generation import Engine
from tests.evaluation.test_likelihood import PAIRS, by_hand
from tests.models.tiny import FAMILIES, lively

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_pass_over_each_text(family: str) -> None:
    model = lively(family)
    expected = [by_hand(model, *pair) for pair in PAIRS]
    engine = Engine(model.to("cuda"))
    for _ in range(2):  # from the second time on a length has its graph
        found = dict(likelihoods(engine, PAIRS, batch_size=4))
        for index, (logprob, _) in enumerate(expected):
            assert found[index].logprob == pytest.approx(logprob, rel=1e-4)
