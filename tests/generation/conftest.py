"""Tiny models, and a state file of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mambalm.diagnostics.tiny import tiny_models
from mambalm.generation.session import Session
from mambalm.models.common import MambalmForCausalLM
from tests.generation.snapshots import TOKENS


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
