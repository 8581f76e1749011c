"""States kept on disk by what led to them: a prompt whose beginning was read before is read on from there.

An entry is a state file named by the digest of its tokens, in a folder named by the model's fingerprint. Any position
can be a boundary: the digest is chained token by token, so that one pass over a prompt finds every entry on its way.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mambalm.generation import state_file
from mambalm.generation.session import Session
from mambalm.generation.snapshot import Snapshot, chain
from mambalm.generation.state_file import StateFileError

_SUFFIX = ".state"


@dataclass
class Counts:
    """What a store did in this process.

    Attributes:
        lookups: prompts looked up.
        hits: those of them that were read on from a stored state: found, whole and used.
        asked: tokens of all prompts looked up.
        found: those of them that did not have to be read.
        stored, evicted, damaged: entries written, removed for the bound, and those that could not be read, which are
            removed where the folder can be written to.
        too_large: states that were not stored since the bound holds none so large.
    """

    lookups: int = 0
    hits: int = 0
    asked: int = 0
    found: int = 0
    stored: int = 0
    evicted: int = 0
    damaged: int = 0
    too_large: int = 0


class PrefixStore:
    """A folder of states, which any number of processes may share.

    Entries appear whole by a rename, and are removed while others may hold them open; one that vanishes or is damaged
    counts as not there. The bound holds after every `put`; a process that writes has one more entry on the disk.
    """

    def __init__(self, folder: Path | str, max_bytes: int) -> None:
        """Keep at most `max_bytes` of states in `folder`, which is made; the least recently used go first.

        Raises:
            ValueError: the bound is not positive.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}; it must hold at least one state")
        self._folder, self._max_bytes = Path(folder), max_bytes
        self.counts = Counts()

    def read(self, session: Session, tokens: Sequence[int], boundaries: Sequence[int] = ()) -> int:
        """Let a session read tokens, from the longest stored prefix of them on, and keep its state there.

        Args:
            session: what it has read before counts as part of the prefix.
            tokens: what it reads.
            boundaries: numbers of these tokens after which to keep the state as well, such as the length of the
                part that many prompts share; what is not behind the known ones and within the tokens is passed over.

        Returns:
            The number of tokens that the session did not have to read.
        """
        start = session.position
        found = self.get(session, tokens)
        if found is not None:
            session.restore(found)
        known = session.position - start
        at = known
        for boundary in sorted({*boundaries, len(tokens)}):
            if known < boundary <= len(tokens):
                session.read(tokens[at:boundary])
                at = boundary
                self.put(session)
        return known

    def get(self, session: Session, tokens: Sequence[int]) -> Snapshot | None:
        """The state after the longest stored prefix of the tokens that follow what the session has read.

        Entries are tried from the longest to the shortest; one that is damaged is removed.
        """
        self.counts.lookups += 1
        self.counts.asked += len(tokens)
        folder = self._entries(session)
        stored = set(os.listdir(folder)) if folder.is_dir() else set()
        found = [
            (length, digest)
            for length, digest in enumerate(chain(session.snapshot.digest, tokens), 1)
            if digest.hex() + _SUFFIX in stored
        ]
        for length, digest in reversed(found):
            if (snapshot := self._load(session, digest)) is not None:
                self.counts.hits += 1
                self.counts.found += length
                return snapshot
        return None

    def put(self, session: Session) -> bool:
        """Keep the session's state, or count it as used if it is there; return whether it fits into the bound."""
        folder, temporaries = self._entries(session), self._folder / "incomplete"
        path = folder / (session.snapshot.digest.hex() + _SUFFIX)
        if path.exists():
            _used(path)
            return True
        for directory in (folder, temporaries):
            directory.mkdir(parents=True, exist_ok=True)
        temporary = temporaries / f"{secrets.token_hex(8)}{_SUFFIX}"
        session.save(temporary)
        if temporary.stat().st_size > self._max_bytes:
            temporary.unlink()
            self.counts.too_large += 1
            return False
        os.replace(temporary, path)
        self.counts.stored += 1
        self._evict()
        return True

    def _entries(self, session: Session) -> Path:
        # With the version in it, an entry of another one is never met, so that one that cannot be read is damaged.
        return self._folder / f"{session.fingerprint.key[:32]}-{state_file.VERSION}"

    def _load(self, session: Session, digest: bytes) -> Snapshot | None:
        path = self._entries(session) / (digest.hex() + _SUFFIX)
        try:
            snapshot, _ = state_file.load(path, session.model, session.fingerprint)
            if snapshot.digest != digest:
                raise StateFileError(f"{path} holds other tokens than its name says")
        except FileNotFoundError:
            return None
        except StateFileError:
            self.counts.damaged += 1
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        _used(path)
        return snapshot

    def _evict(self) -> None:
        """Remove the least recently used entries above the bound, and what killed processes left."""
        files = []
        for path in self._folder.glob("*/*"):
            # Another process may have removed it.
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        entries = [file for file in files if file[2].parent.name != "incomplete"]
        stale = time.time_ns() - int(state_file.STALE_SECONDS * 1e9)
        for used, _, path in files:
            if path.parent.name != "incomplete" or used >= stale:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        excess = sum(size for _, size, _ in entries) - self._max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size
            self.counts.evicted += 1


def _used(path: Path) -> None:
    """Note that an entry was used; it may have been removed, or the folder be one that can only be read."""
    with contextlib.suppress(OSError):
        os.utime(path)
