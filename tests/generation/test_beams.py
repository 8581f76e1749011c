"""Beam search beside transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mambalm import State
from mambalm.generation import Engine, beam_search, read
from tests.models.tiny import FAMILIES, WITH_TRANSFORMERPP, lively, tokens

PROMPT = tokens(7)


@pytest.mark.parametrize("family", WITH_TRANSFORMERPP)
@pytest.mark.parametrize(
    ("beams", "penalty", "ends"),
    [(3, 1.0, ()), (4, 1.0, (5, 9, 30)), (2, 0.0, tuple(range(0, 48, 3))), (4, -0.7, (7,))],
)
def test_beams_are_those_of_generate(family: str, beams: int, penalty: float, ends: tuple[int, ...]) -> None:
    model = WITH_TRANSFORMERPP[family].model()
    found = beam_search(
        Engine(model), PROMPT, beams, max_new_tokens=9, end_tokens=frozenset(ends), length_penalty=penalty
    )
    expected = model.generate(
        PROMPT[None],
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=9,
        do_sample=False,
        length_penalty=penalty,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    # What it could not fill, generate returns at a score of -1e9.
    real = expected.sequences_scores > -1e8
    assert torch.allclose(
        torch.tensor([beam.score for beam in found]), expected.sequences_scores[real], rtol=1e-4, atol=1e-4
    )
    for beam, ids in zip(found, expected.sequences[real].tolist(), strict=True):
        assert list(beam.tokens) == ids[len(PROMPT) : len(PROMPT) + len(beam.tokens)]
        assert beam.is_finished == (beam.tokens[-1] in ends)


def test_what_cannot_become_better_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sooner or later than transformers' `early_stopping=False` would be another result, and more steps."""
    model, steps = lively("mamba"), []
    reader = Engine.reader
    ends = tuple(range(0, 48, 2))

    def counted(engine: Engine, state: State) -> Callable[[torch.Tensor], torch.Tensor]:
        one = reader(engine, state)
        read = type(one).__call__
        monkeypatch.setattr(type(one), "__call__", lambda self, ids: (steps.append(1), read(self, ids))[1])
        return one

    monkeypatch.setattr(Engine, "reader", counted)
    found = beam_search(Engine(model), PROMPT, 3, max_new_tokens=60, end_tokens=frozenset(ends), length_penalty=0.5)
    expected = model.generate(
        PROMPT[None],
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=60,
        length_penalty=0.5,
        eos_token_id=list(ends),
        pad_token_id=0,
        do_sample=False,
    )
    assert 1 < len(steps) < 59
    assert len(expected[0]) - len(PROMPT) <= len(steps) + 1
    for beam, ids in zip(found, expected.tolist(), strict=True):
        assert list(beam.tokens) == ids[len(PROMPT) : len(PROMPT) + len(beam.tokens)]


def test_beams_go_on_behind_a_state() -> None:
    model = FAMILIES["falcon_mamba"].model()
    engine = Engine(model)
    _, state = read(model, [PROMPT[:4]])
    found = beam_search(engine, PROMPT[4:], 3, max_new_tokens=6, state=state)
    expected = beam_search(engine, PROMPT, 3, max_new_tokens=6)
    assert [beam.tokens for beam in found] == [beam.tokens for beam in expected]


@pytest.mark.parametrize(("beams", "count"), [(1, 5), (2, 0)])
def test_sizes_that_make_no_search_are_refused(beams: int, count: int) -> None:
    with pytest.raises(ValueError, match="at least 2 beams and 1 token"):
        beam_search(Engine(FAMILIES["mamba"].model()), PROMPT, beams, max_new_tokens=count)


def test_more_beams_than_tokens_are_refused() -> None:
    engine = Engine(FAMILIES["mamba"].model())
    with pytest.raises(ValueError, match="100000 beams begin with as many tokens, of a vocabulary of 48: give fewer"):
        beam_search(engine, PROMPT, 100_000, max_new_tokens=3)


def test_logits_that_become_no_numbers_are_told() -> None:
    model = FAMILIES["mamba2"].model()

    def broken(module: object, arguments: object, logits: torch.Tensor) -> torch.Tensor:
        return logits if logits.shape[0] == 1 else logits.index_fill(0, torch.tensor([1]), torch.nan)

    model.lm_head.register_forward_hook(broken)
    with pytest.raises(ValueError, match="the logits after 1 tokens are NaN or infinite"):
        beam_search(Engine(model), PROMPT, 3, max_new_tokens=4)
