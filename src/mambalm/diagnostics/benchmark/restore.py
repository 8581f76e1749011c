"""How long it takes to save a state and to have it back, and whether it is the same to the bit."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from mambalm.diagnostics.benchmark.measuring import clock
from mambalm.diagnostics.benchmark.subjects import MambalmSubject, Subject
from mambalm.generation import Session, step


def measure_restore(subject: Subject, length: int = 2048, repeats: int = 7) -> dict[str, Any]:
    """Read random tokens, save the state, and load it back from the page cache.

    Returns:
        The file's size, the median seconds of a save (with its flush to the disk) and of a load, and whether the logits
        after one more token are the same bits on both sides.

    Raises:
        ValueError: the model is not mambalm's.
    """
    if not isinstance(subject, MambalmSubject):
        raise ValueError(f"{subject.name} is not mambalm's: only its models keep state files")
    session, restored = Session(subject.model), Session(subject.model)
    session.read(torch.randint(subject.vocabulary, (length,), generator=torch.Generator().manual_seed(0)).tolist())
    # Taken once in a session's life, and no part of a save or a load.
    assert session.fingerprint.key == restored.fingerprint.key
    saves, loads = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.state"
        for _ in range(repeats):
            began = clock(subject.device)
            session.save(path)
            saved = clock(subject.device)
            restored.load(path)
            loads.append(clock(subject.device) - saved)
            saves.append(saved - began)
        size = path.stat().st_size
    token = torch.zeros(1, dtype=torch.long, device=subject.device)
    here, there = (step(subject.model, token, one.snapshot.state)[0] for one in (session, restored))
    return {
        "tokens": length,
        "state_bytes": session.snapshot.state.nbytes,
        "file_bytes": size,
        "save_seconds": round(statistics.median(saves), 5),
        "restore_seconds": round(statistics.median(loads), 5),
        "next_logits_equal": bool(torch.equal(here, there)),
    }
