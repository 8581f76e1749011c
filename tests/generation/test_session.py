"""Sessions: what was saved, forked, rewound or read in pieces is what one uninterrupted reading gives."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from mambalm.diagnostics.tiny import VOCABULARY, tiny_models
from mambalm.generation import Engine, Sampling, Settings, state_file
from mambalm.generation.cpu_step import CPUStep
from mambalm.generation.fingerprint import Fingerprint
from mambalm.generation.session import Ladder, Session
from mambalm.generation.snapshot import NOTHING_READ, Snapshot, advance, chain
from mambalm.generation.state_file import StateFileError
from mambalm.models.common import MambalmForCausalLM
from mambalm.quantization.model import quantize_model
from tests.helpers import FLOAT32, relative_error

FAMILIES = ["Mamba", "FalconMamba", "Mamba-2", "Mamba-2 with attention", "Transformer++"]
TOKENS = torch.randint(VOCABULARY, (60,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def models() -> dict[str, MambalmForCausalLM]:
    return tiny_models()


@pytest.fixture
def mamba(models: dict[str, MambalmForCausalLM]) -> MambalmForCausalLM:
    return models["Mamba"]


@pytest.fixture
def saved(mamba: MambalmForCausalLM, tmp_path: Path) -> Path:
    session = Session(mamba, chunk_size=8)
    session.read(TOKENS[:20])
    session.save(tmp_path / "saved.state")
    return tmp_path / "saved.state"


def tensors(snapshot: Snapshot) -> Iterator[torch.Tensor]:
    assert snapshot.logits is not None
    yield from (snapshot.logits, snapshot.counts, snapshot.state.position)
    for layer in snapshot.state.layers:
        yield from (value for value in vars(layer).values() if value is not None)


def assert_same_bits(actual: Snapshot, expected: Snapshot) -> None:
    assert actual.digest == expected.digest
    for one, other in zip(tensors(actual), tensors(expected), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


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


def test_penalties_count_what_a_file_has_read(saved: Path, mamba: MambalmForCausalLM) -> None:
    way = Sampling(temperature=0.7, repetition_penalty=3.0, presence_penalty=0.2, frequency_penalty=0.3)
    settings = Settings(sampling=way, max_new_tokens=12, seed=2)
    session = Session(mamba)
    session.load(saved)
    session.read(TOKENS[20:25])
    expected = [token.id for token in Engine(mamba).generate([torch.tensor(TOKENS[:25])], settings)]
    assert list(session.write(settings)) == expected


def another_weight(model: MambalmForCausalLM) -> None:
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight.mul_(1.01)


def hardly_another_weight(model: MambalmForCausalLM) -> None:
    """By less than bfloat16 rounds."""
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight.mul_(1.0001)


def another_epsilon(model: MambalmForCausalLM) -> None:
    model.config.layer_norm_epsilon = 1e-3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_weight, "the values of backbone.layers.1.mixer.out_proj.weight differ"),
        (hardly_another_weight, "the values of backbone.layers.1.mixer.out_proj.weight differ: the model was trained"),
        (another_epsilon, "the model's layer_norm_epsilon is 1e-05 there and 0.001 here"),
    ],
)
def test_another_model_is_refused(saved: Path, change: object, reason: str) -> None:
    model = tiny_models()["Mamba"]
    Session(model).load(saved)
    change(model)  # type: ignore[operator]
    with pytest.raises(StateFileError, match=f"saved.state does not fit: {reason}"):
        Session(model).load(saved, convert=True)


def test_another_family_is_refused(saved: Path, models: dict[str, MambalmForCausalLM]) -> None:
    with pytest.raises(StateFileError, match="the model there is a MambaForCausalLM, here a Mamba2ForCausalLM"):
        Session(models["Mamba-2"]).load(saved)


def test_another_tokenizer_is_refused(
    mamba: MambalmForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    session = Session(mamba, tiny_tokenizer)
    session.read(TOKENS)
    session.save(tmp_path / "a.state")
    tiny_tokenizer("truncated", truncation=True, max_length=2)
    Session(mamba, tiny_tokenizer).load(tmp_path / "a.state")
    other = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    other.add_tokens(["quick"])
    with pytest.raises(StateFileError, match="the tokenizer there is another one"):
        Session(mamba, other).load(tmp_path / "a.state")


@pytest.mark.parametrize(("there", "here"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("name", ["Mamba", "Mamba-2 with attention"])
def test_another_dtype_only_on_request(name: str, there: torch.dtype, here: torch.dtype, tmp_path: Path) -> None:
    model = tiny_models(there)[name]
    session = Session(model)
    session.read(TOKENS[:30])
    session.save(tmp_path / "a.state")
    cast = Session(nn.Module.to(tiny_models(there)[name], here))
    with pytest.raises(StateFileError, match=r"(float32|bfloat16) there and (float32|bfloat16) here; ask for"):
        cast.load(tmp_path / "a.state")
    cast.load(tmp_path / "a.state", convert=True)
    for layer, fresh in zip(cast.snapshot.state.layers, cast.model.init_state(1).layers, strict=True):
        assert [value.dtype for value in vars(layer).values()] == [value.dtype for value in vars(fresh).values()]
    for reader in (session, cast):
        reader.read(TOKENS[30:])
    assert session.snapshot.logits is not None
    assert cast.snapshot.logits is not None
    assert relative_error(cast.snapshot.logits, session.snapshot.logits) < 0.05


def test_another_model_of_another_dtype_is_refused(saved: Path) -> None:
    model = tiny_models()["Mamba"]
    another_weight(model)
    with pytest.raises(StateFileError, match=r"differ by more than the rounding of float32 and bfloat16"):
        Session(nn.Module.to(model, torch.bfloat16)).load(saved, convert=True)


def test_another_shape_is_told(mamba: MambalmForCausalLM) -> None:
    here = Fingerprint.of(mamba)
    name = "backbone.layers.0.mixer.D"
    there = replace(here, parameters={**here.parameters, name: ("float32", [1, 64])})
    assert list(there.differences(here))[:1] == [f"{name} is (1, 64) there and (64,) here"]


def test_another_device_only_on_request(mamba: MambalmForCausalLM) -> None:
    here = Fingerprint.of(mamba)
    there = replace(here, device="cuda")
    (difference,) = there.differences(here)
    assert difference.startswith("the model there was on cuda, here it is on cpu; ask for the conversion")
    assert not list(there.differences(here, convert=True))
    assert there.key != here.key == Fingerprint.of(mamba).key


@pytest.mark.parametrize("length", [0, 7, 100, 5000, -1])
def test_a_truncated_file_is_refused(saved: Path, mamba: MambalmForCausalLM, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(StateFileError, match="truncated"):
        Session(mamba).load(saved)


def test_a_bit_that_flipped_in_any_tensor_is_seen(saved: Path, mamba: MambalmForCausalLM) -> None:
    whole = bytearray(saved.read_bytes())
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    regions = [(entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__"]
    assert len(regions) == 8  # two layers, position, logits, counts, samples
    for (first, behind), name in regions:
        for at in {first, (first + behind) // 2, behind - 1}:
            whole[end + at] ^= 1
            saved.write_bytes(whole)
            whole[end + at] ^= 1
            with pytest.raises(StateFileError, match="its checksum does not fit"):
                Session(mamba).load(saved)
            assert name


def test_a_bit_that_flipped_anywhere_in_the_header_is_seen(saved: Path, mamba: MambalmForCausalLM) -> None:
    session, whole = Session(mamba), bytearray(saved.read_bytes())
    before = state_file.load(saved, mamba, session.fingerprint)
    end = 8 + int.from_bytes(whole[:8], "little")
    for at in {*range(8, end, 11), *range(8, 120)}:
        whole[at] ^= 1 << at % 7
        saved.write_bytes(whole)
        whole[at] ^= 1 << at % 7
        try:
            after = state_file.load(saved, mamba, session.fingerprint)
        except StateFileError:
            continue
        # White space, and what is there for older readers.
        assert (after[0].digest, after[1]) == (before[0].digest, before[1])
        assert torch.equal(after[0].counts, before[0].counts)


def test_a_foreign_file_is_refused(saved: Path, mamba: MambalmForCausalLM) -> None:
    save_file(load_file(saved), saved, metadata={"format": "pt"})
    with pytest.raises(StateFileError, match="is a safetensors file but no state file"):
        Session(mamba).load(saved)
    saved.write_text("Call me Ishmael. Some years ago, never mind how long precisely")
    with pytest.raises(StateFileError, match="no safetensors file"):
        Session(mamba).load(saved)
    with pytest.raises(FileNotFoundError):
        Session(mamba).load(saved.with_name("missing.state"))


def test_a_newer_version_is_refused(saved: Path, mamba: MambalmForCausalLM) -> None:
    metadata = {"format": "mambalm state", "version": "2", "content": json.dumps({"form": "unknown"})}
    save_file(load_file(saved), saved, metadata=metadata)
    with pytest.raises(StateFileError, match="of version 2, and this mambalm knows up to 1: update mambalm"):
        Session(mamba).load(saved)


def test_a_full_disk_leaves_the_old_file(saved: Path, mamba: MambalmForCausalLM) -> None:
    import resource

    before, session = saved.read_bytes(), Session(mamba)
    session.read(TOKENS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*saved\.state.*what was there is intact"):
            session.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_interrupted_within_a_save(saved: Path, mamba: MambalmForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before, session = saved.read_bytes(), Session(mamba)
    session.read(TOKENS)

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mambalm.generation.state_file.flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_several_write_one_file_and_it_is_whole_at_any_moment(saved: Path, mamba: MambalmForCausalLM) -> None:
    sessions = [Session(mamba, chunk_size=8) for _ in range(3)]
    for session in sessions:
        session.read(TOKENS[: 3 + len(session.ladder.positions)])
    digests = {session.snapshot.digest for session in sessions} | {advance(NOTHING_READ, TOKENS[:20])}

    def write(session: Session) -> None:
        for _ in range(15):
            session.save(saved)
            assert state_file.load(saved, mamba, session.fingerprint)[0].digest in digests

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, sessions))
    assert list(saved.parent.iterdir()) == [saved]


def test_a_link_stays_one(saved: Path, mamba: MambalmForCausalLM, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "link.state"
    link.parent.mkdir()
    link.symlink_to(saved)
    session = Session(mamba)
    session.read(TOKENS)
    session.save(link)
    assert link.is_symlink()
    assert list(link.parent.iterdir()) == [link]
    restored = Session(mamba)
    restored.load(saved)
    assert_same_bits(restored.snapshot, session.snapshot)


def test_what_killed_saves_left_goes_in_time(saved: Path, mamba: MambalmForCausalLM) -> None:
    left = [saved.with_name(f".saved.state.{number}.incomplete") for number in range(2)]
    for folder in left:
        folder.mkdir()
        (folder / ".tmpAbCdEf").write_bytes(b"part of a state")
    os.utime(left[0], (time.time() - 7200, time.time() - 7200))
    Session(mamba).save(saved)
    assert sorted(saved.parent.iterdir()) == [left[1], saved]
    state_file.remove(saved)
    assert not list(saved.parent.iterdir())


def test_a_failed_save_leaves_the_old_file(
    saved: Path, mamba: MambalmForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    session = Session(mamba)
    session.read(TOKENS)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("mambalm.generation.state_file.flush", full)
    with pytest.raises(OSError, match="No space left"):
        session.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
