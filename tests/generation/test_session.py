"""Sessions: what was saved, forked, rewound or read in pieces is what one uninterrupted reading gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mambalm.diagnostics.tiny import VOCABULARY, tiny_models
from mambalm.generation import Engine, Sampling, Settings
from mambalm.generation.cpu_step import CPUStep
from mambalm.generation.session import Ladder, Session, continue_texts
from mambalm.generation.snapshot import NOTHING_READ, Snapshot, advance, chain
from mambalm.generation.state_file import StateFileError
from mambalm.models.common import MambalmForCausalLM
from mambalm.quantization.model import quantize_model
from tests.generation.snapshots import TOKENS, assert_same_bits, tensors
from tests.helpers import FLOAT32, relative_error

FAMILIES = ["Mamba", "FalconMamba", "Mamba-2", "Mamba-2 with attention", "Transformer++"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_is_uninterrupted(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_models(dtype)[name]
    whole = Session(model, chunk_size=8)
    whole.read(TOKENS[:21])
    whole.save(tmp_path / "a.state", {"page": 3})
    restored = Session(model, chunk_size=8)
    assert restored.load(tmp_path / "a.state") == {"page": 3}
    assert_same_bits(restored.snapshot, whole.snapshot)
    settings = Settings(sampling=Sampling(temperature=1.0, repetition_penalty=1.5), seed=1, max_new_tokens=6)
    assert list(restored.write(settings)) == list(whole.write(settings))
    for session in (whole, restored):
        session.read(TOKENS[21:])
    assert_same_bits(restored.snapshot, whole.snapshot)
    assert whole.position == 66


@pytest.mark.parametrize("name", FAMILIES)
def test_a_quantised_model_goes_on_and_stays_apart(name: str, models: dict, tmp_path: Path) -> None:
    quantized = quantize_model(tiny_models()[name], "int8")
    whole, restored = Session(quantized, chunk_size=8), Session(quantized, chunk_size=8)
    whole.read(TOKENS[:21])
    whole.save(tmp_path / "a.state")
    restored.load(tmp_path / "a.state")
    settings = Settings(max_new_tokens=5)
    assert list(restored.write(settings)) == list(whole.write(settings))
    for session in (whole, restored):
        session.read(TOKENS[21:])
    assert_same_bits(restored.snapshot, whole.snapshot)
    with pytest.raises(StateFileError, match="does not fit"):
        Session(models[name]).load(tmp_path / "a.state", convert=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_reading_from_a_chunk_boundary_on_gives_the_same_bits(models: dict, name: str) -> None:
    whole, parts = (Session(models[name], chunk_size=8) for _ in range(2))
    whole.read(TOKENS)
    count = parts.whole_chunks(len(TOKENS[:30]))
    assert count == 24
    for start, stop in ((0, count), (count, 40), (40, 60)):
        parts.read(TOKENS[start:stop])
    assert_same_bits(parts.snapshot, whole.snapshot)
    assert whole.snapshot.counts.tolist() == [TOKENS.count(token) for token in range(VOCABULARY)]


def test_a_long_text_is_read_in_chunks(mamba: MambalmForCausalLM) -> None:
    lengths = []
    handle = mamba.backbone.register_forward_pre_hook(
        lambda module, arguments, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    session = Session(mamba, chunk_size=16)
    for start, stop in ((0, 5), (5, 60)):
        session.read(TOKENS[start:stop])
    handle.remove()
    assert lengths == [5, 11, 16, 16, 12]


def test_a_text_with_an_unknown_token_is_not_begun(mamba: MambalmForCausalLM) -> None:
    session = Session(mamba, chunk_size=8)
    for wrong in (VOCABULARY, -1):
        with pytest.raises(ValueError, match="but the model's vocabulary has 64"):
            session.read([*TOKENS[:20], wrong])
        assert session.position == 0
    session.read([])
    assert session.position == 0


@pytest.mark.parametrize("given", [np.array, torch.tensor, tuple])
def test_tokens_of_other_kinds(mamba: MambalmForCausalLM, given: Callable[[list[int]], Sequence[int]]) -> None:
    session, expected = Session(mamba, chunk_size=8), Session(mamba, chunk_size=8)
    session.read(given(TOKENS))
    expected.read(TOKENS)
    assert_same_bits(session.snapshot, expected.snapshot)


def test_the_digest_is_a_fixed_one() -> None:
    """State files and prefix stores of earlier days are known by it."""
    assert NOTHING_READ.hex() == "9fe1b27474c90ff4f019af305fdafc12b2bb40241612859c04240b9ea7e7d6b0"
    assert (
        advance(NOTHING_READ, [1, 65023, 7]).hex() == "61d1bca2e47954b03ed1ff499ff690dbda9d646bccb6ff569461a8a8899bd839"
    )


def test_the_digest_is_of_the_tokens_alone() -> None:
    assert list(chain(NOTHING_READ, TOKENS))[-1] == advance(advance(NOTHING_READ, TOKENS[:7]), TOKENS[7:])
    assert len(set(chain(NOTHING_READ, TOKENS))) == len(TOKENS)
    assert advance(NOTHING_READ, [1, 2]) != advance(NOTHING_READ, [2, 1])
    assert advance(NOTHING_READ, []) == NOTHING_READ


def test_writing_stops_where_the_caller_stops(mamba: MambalmForCausalLM) -> None:
    session = Session(mamba)
    session.read(TOKENS[:9])
    expected = list(session.fork().write(Settings(max_new_tokens=8)))
    tokens = session.write(Settings(max_new_tokens=8))
    assert [next(tokens) for _ in range(4)] == expected[:4]
    tokens.close()
    assert session.written == expected[:3]
    other = Session(mamba)
    other.read(TOKENS[:9] + expected[:3])
    assert session.snapshot.digest == other.snapshot.digest
    assert session.snapshot.logits is not None
    assert other.snapshot.logits is not None
    assert relative_error(session.snapshot.logits, other.snapshot.logits) <= FLOAT32
    assert list(session.write(Settings(end_tokens=frozenset(expected[3:4])))) == []


def test_interrupted_within_a_step(mamba: MambalmForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(mamba)
    session.read(TOKENS[:9])
    before, steps = session.snapshot, iter([None, None])
    step = CPUStep.__call__

    def interrupted(self: CPUStep, token: torch.Tensor) -> torch.Tensor:
        logits = step(self, token)
        if next(steps, "over") == "over":
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(CPUStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(session.write(Settings(max_new_tokens=8)))
    assert session.snapshot is before
    assert session.written == []


def test_logits_that_become_no_numbers_leave_the_session_where_it_was() -> None:
    model = tiny_models()["Mamba"]
    session = Session(model)
    session.read(TOKENS[:9])
    before = session.snapshot
    with torch.no_grad():
        model.backbone.layers[1].mixer.D[3] = torch.nan
    with pytest.raises(ValueError, match="the logits after token 10 are NaN or infinite"):
        list(session.write(Settings(max_new_tokens=8)))
    assert session.snapshot is before
    assert session.written == []


def test_nothing_read_is_nothing_to_continue(mamba: MambalmForCausalLM) -> None:
    with pytest.raises(ValueError, match="there is nothing to continue"):
        list(Session(mamba).write(Settings()))


def test_forks_do_not_see_each_other(mamba: MambalmForCausalLM) -> None:
    session = Session(mamba, chunk_size=8)
    session.read(TOKENS[:24])
    before, fork = session.snapshot, session.fork()
    kept = [tensor.clone() for tensor in tensors(before)]
    fork.read(TOKENS[24:])
    assert session.snapshot is before
    assert all(map(torch.equal, tensors(before), kept))
    assert session.ladder.positions == [8, 16]
    assert fork.ladder.positions[-1] == 56


def test_rewound_is_as_if_never_read(mamba: MambalmForCausalLM) -> None:
    session, other = Session(mamba, chunk_size=8), Session(mamba, chunk_size=8)
    session.read(TOKENS)
    other.read(TOKENS[:30])
    landed = session.rewind(30)
    assert landed in range(8, 31, 8)
    assert 30 - landed <= 60 - 30
    session.read(TOKENS[landed:30])
    assert_same_bits(session.snapshot, other.snapshot)
    assert session.rewind(0) == 0
    assert session.snapshot.digest == NOTHING_READ
    with pytest.raises(ValueError, match="cannot rewind to token 1: the session has read 0"):
        session.rewind(1)


def test_the_ladder_reaches_far_with_few_rungs() -> None:
    model = tiny_models()["Mamba"]
    ladder, start, offered = Ladder(64), Snapshot.fresh(model), 400
    for position in range(1, offered + 1):
        state = type(start.state)(start.state.layers, torch.tensor([position]))
        ladder.offer(Snapshot(state, None, start.counts, start.digest))
    assert len(ladder.positions) <= 2 * offered.bit_length() + 2
    for back in range(offered):
        found = ladder.at_or_before(offered - back)
        assert found is None or offered - back - found.position <= back + 1
        assert found is not None or offered - back <= back + 1
    short = Ladder(3)
    for position in range(1, 40):
        state = type(start.state)(start.state.layers, torch.tensor([position]))
        short.offer(Snapshot(state, None, start.counts, start.digest))
    assert len(short.positions) <= 3
    assert short.positions[-1] == 39


def test_what_was_read_before_a_file_is_no_place_to_go_back_to(saved: Path, mamba: MambalmForCausalLM) -> None:
    session = Session(mamba, chunk_size=8)
    session.read(list(reversed(TOKENS)))
    session.load(saved)
    assert session.rewind(17) == 0


def test_what_was_written_can_be_taken_back(mamba: MambalmForCausalLM) -> None:
    session = Session(mamba, chunk_size=64)
    session.read(TOKENS[:9])
    before = session.snapshot
    list(session.write(Settings(max_new_tokens=8)))
    session.read([1, 2])
    assert session.position == 19
    assert session.rewind(16) == 9
    assert session.snapshot is before


def test_texts_behind_one_session_are_continued_each_by_itself(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tiny_tokenizer.backend_tokenizer))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    assert tokenizer("fox")["input_ids"][0] == 0
    session = Session(tiny_model, tokenizer)
    session.read(tokenizer("the quick brown")["input_ids"])
    settings = Settings(sampling=Sampling(temperature=4.0), max_new_tokens=9, seed=4, copies=2)
    texts, before = [""] * 6, session.snapshot
    for token, text in continue_texts(session, [" fox", "", " fox"], settings):
        texts[token.row] += text
    assert session.snapshot is before
    for row in range(6):
        alone, ids = session.fork(), tokenizer(["x fox", "x", "x fox"][row // 2])["input_ids"][2:]
        alone.read(ids)
        expected = alone.write_text(replace(settings, copies=1, seed=4 + row), (), ids)
        assert "".join(expected) == texts[row]
    assert len(set(texts)) == 6
    with pytest.raises(ValueError, match="prompt 2 has no tokens"):
        next(continue_texts(Session(tiny_model, tiny_tokenizer), ["fox", ""], settings))


def test_penalties_count_what_a_file_has_read(saved: Path, mamba: MambalmForCausalLM) -> None:
    way = Sampling(temperature=0.7, repetition_penalty=3.0, presence_penalty=0.2, frequency_penalty=0.3)
    settings = Settings(sampling=way, max_new_tokens=12, seed=2)
    session = Session(mamba)
    session.load(saved)
    session.read(TOKENS[20:25])
    expected = [token.id for token in Engine(mamba).generate([torch.tensor(TOKENS[:25])], settings)]
    assert list(session.write(settings)) == expected
