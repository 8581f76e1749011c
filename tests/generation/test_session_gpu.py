"""Sessions on a GPU: a state that comes back is the same to the bit, and changes its device where that is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mambalm.diagnostics.tiny import VOCABULARY, tiny_models
from mambalm.generation import Session, Settings
from mambalm.generation.state_file import StateFileError
from tests.helpers import relative_error

pytestmark = pytest.mark.gpu
TOKENS = torch.randint(VOCABULARY, (60,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("name", ["Mamba", "FalconMamba", "Mamba-2", "Mamba-2 with attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_is_uninterrupted(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_models(dtype, "cuda")[name]
    whole, restored = Session(model, chunk_size=8), Session(model, chunk_size=8)
    whole.read(TOKENS[:21])
    whole.save(tmp_path / "a.state")
    restored.load(tmp_path / "a.state")
    assert list(restored.write(Settings(max_new_tokens=6))) == list(whole.write(Settings(max_new_tokens=6)))
    for session in (whole, restored):
        session.read(TOKENS[21:])
        assert session.snapshot.logits is not None
    assert torch.equal(whole.snapshot.logits, restored.snapshot.logits)  # type: ignore[arg-type]


def test_another_device_only_on_request(tmp_path: Path) -> None:
    there, here = (Session(tiny_models(torch.float32, device)["Mamba"], chunk_size=8) for device in ("cuda", "cpu"))
    here.model.load_state_dict(there.model.state_dict())
    there.read(TOKENS[:30])
    there.save(tmp_path / "a.state")
    with pytest.raises(StateFileError, match="the model there was on cuda, here it is on cpu; ask for the conversion"):
        here.load(tmp_path / "a.state")
    here.load(tmp_path / "a.state", convert=True)
    for session in (there, here):
        session.read(TOKENS[30:])
    assert there.snapshot.logits is not None
    assert here.snapshot.logits is not None
    assert relative_error(here.snapshot.logits, there.snapshot.logits) < 1e-3
