"""The prefix store: what it finds, what it keeps within its bound, and what it does with damage."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mambalm.diagnostics.tiny import VOCABULARY, tiny_models
from mambalm.generation.prefix_store import Counts, PrefixStore
from mambalm.generation.session import Session
from mambalm.models.common import MambalmForCausalLM

TOKENS = torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(1)).tolist()
OTHERS = [VOCABULARY - 1 - token for token in TOKENS]
BIG = 2**24


@pytest.fixture(scope="module")
def model() -> MambalmForCausalLM:
    return tiny_models()["Mamba"]


def read(store: PrefixStore, model: MambalmForCausalLM, tokens: list[int], *boundaries: int) -> tuple[int, Session]:
    session = Session(model, chunk_size=8)
    return store.read(session, tokens, boundaries), session


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.parent.name != "incomplete")


def test_the_longest_stored_prefix_is_found(model: MambalmForCausalLM, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, BIG)
    known, whole = read(store, model, TOKENS, 8, 24)
    assert known == 0
    assert read(store, model, TOKENS[:30])[0] == 24
    assert read(store, model, TOKENS[:20] + OTHERS)[0] == 8
    assert read(store, model, OTHERS)[0] == 0
    known, again = read(store, model, TOKENS)
    assert known == 40
    assert again.snapshot.logits is not None
    assert whole.snapshot.logits is not None
    assert torch.equal(again.snapshot.logits, whole.snapshot.logits)
    asked = 40 + 30 + 60 + 40 + 40
    # Three by the first prompt, one each by those that were read on; a whole hit stores nothing.
    assert store.counts == Counts(lookups=5, hits=3, asked=asked, found=24 + 8 + 40, stored=6)
    assert PrefixStore(tmp_path, BIG).get(Session(model), TOKENS) is not None


def test_what_was_read_before_is_part_of_the_prefix(model: MambalmForCausalLM, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, BIG)
    session = Session(model, chunk_size=8)
    session.read(TOKENS[:10])
    store.read(session, TOKENS[10:])
    assert read(store, model, TOKENS[10:])[0] == 0
    behind = Session(model, chunk_size=8)
    behind.read(TOKENS[:10])
    assert store.read(behind, TOKENS[10:]) == 30
    assert behind.position == 40


def test_another_model_finds_nothing(model: MambalmForCausalLM, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, BIG)
    read(store, model, TOKENS)
    assert read(store, tiny_models(seed=1)["Mamba"], TOKENS)[0] == 0
    assert store.counts.damaged == 0


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "renamed"])
def test_damaged_entries_are_ignored_and_removed(model: MambalmForCausalLM, tmp_path: Path, damage: str) -> None:
    store = PrefixStore(tmp_path, BIG)
    read(store, model, TOKENS, 8)
    longest = max(entries(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    data = longest.read_bytes()
    if damage == "renamed":
        (shorter,) = set(entries(tmp_path)) - {longest}
        longest.write_bytes(shorter.read_bytes())
    else:
        broken = {
            "truncated": data[:-5],
            "flipped": data[:-1] + bytes([data[-1] ^ 8]),
            "empty": b"",
            "foreign": b"x" * 99,
        }
        longest.write_bytes(broken[damage])
    assert store.get(Session(model), TOKENS).position == 8  # type: ignore[union-attr]
    assert store.counts.damaged == 1
    assert store.counts.hits == 1
    assert not longest.exists()


def test_the_least_recently_used_go(model: MambalmForCausalLM, tmp_path: Path) -> None:
    probe = PrefixStore(tmp_path / "probe", BIG)
    read(probe, model, TOKENS)
    (size,) = [path.stat().st_size for path in entries(tmp_path / "probe")]
    store = PrefixStore(tmp_path / "store", 3 * size + size // 2)
    prompts = [[number, *TOKENS] for number in range(4)]
    for prompt in prompts[:3]:
        read(store, model, prompt)
        time.sleep(0.01)
    assert read(store, model, prompts[0])[0] == 41
    time.sleep(0.01)
    read(store, model, prompts[3])
    assert store.counts.evicted == 1
    # What is kept once more is used as well.
    again = PrefixStore(tmp_path / "store", 3 * size + size // 2)
    session = Session(model, chunk_size=8)
    session.read(prompts[2])
    assert again.put(session)
    time.sleep(0.01)
    read(again, model, OTHERS)
    assert again.counts == Counts(lookups=1, asked=40, stored=1, evicted=1)
    read(again, model, prompts[3])
    assert sum(path.stat().st_size for path in entries(tmp_path / "store")) <= 3 * size + size // 2
    found = [store.get(Session(model), prompt) is not None for prompt in prompts]
    assert found == [False, False, True, True]
    small = PrefixStore(tmp_path / "small", size - 1)
    assert read(small, model, TOKENS)[0] == 0
    assert small.counts.stored == 0
    assert not entries(tmp_path / "small")
    with pytest.raises(ValueError, match="max_bytes is 0"):
        PrefixStore(tmp_path, 0)


def test_what_a_killed_process_left_is_removed(model: MambalmForCausalLM, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, BIG)
    read(store, model, TOKENS)
    old, new = tmp_path / "incomplete" / "old.state", tmp_path / "incomplete" / "new.state"
    folder = tmp_path / "incomplete" / ".older.state.0123abcd.incomplete"
    folder.mkdir()
    for path in (old, new, folder / ".tmpAbCdEf"):
        path.write_bytes(b"part of a state")
    for path in (old, folder):
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    read(store, model, OTHERS)
    assert list((tmp_path / "incomplete").iterdir()) == [new]


def test_many_share_a_store(model: MambalmForCausalLM, tmp_path: Path) -> None:
    bound = 80_000
    sessions = []
    for number in range(6):
        sessions.append(Session(model, chunk_size=8))
        sessions[-1].read([number, *TOKENS])

    def work(first: int) -> Counts:
        store, empty = PrefixStore(tmp_path, bound), Session(model)
        for turn in range(20):
            number = (first + turn) % 6
            store.put(sessions[number])
            found = store.get(empty, [number, *TOKENS])
            assert found is None or found.digest == sessions[number].snapshot.digest
        return store.counts

    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(work, range(4)))
    assert all(count.damaged == 0 and count.lookups == 20 for count in counts)
    assert sum(count.evicted for count in counts) > 0
    assert 0 < sum(path.stat().st_size for path in entries(tmp_path)) <= bound
    assert not list((tmp_path / "incomplete").iterdir())


def test_a_store_that_can_only_be_read_is_read(
    model: MambalmForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PrefixStore(tmp_path, BIG)
    read(store, model, TOKENS, 8)
    shorter, longest = sorted(entries(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    longest.write_bytes(b"damaged")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("utime", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    session = Session(model, chunk_size=8)
    assert read(store, model, TOKENS[:8])[0] == 8
    assert store.get(session, TOKENS).position == 8  # type: ignore[union-attr]
    assert store.counts == Counts(lookups=3, hits=2, asked=88, found=16, stored=2, damaged=1)
    assert entries(tmp_path) == sorted([shorter, longest])
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="Read-only file system"):
        read(store, model, OTHERS)
