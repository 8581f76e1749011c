"""State files: whole or not there, and refused where they do not fit."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from mambalm.diagnostics.tiny import tiny_models
from mambalm.generation import state_file
from mambalm.generation.fingerprint import Fingerprint
from mambalm.generation.session import Session
from mambalm.generation.snapshot import NOTHING_READ, advance
from mambalm.generation.state_file import StateFileError
from mambalm.models.common import MambalmForCausalLM
from tests.generation.snapshots import TOKENS, assert_same_bits
from tests.helpers import relative_error


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
