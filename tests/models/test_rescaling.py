"""Models that began with rescaled residual branches, in transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mambalm
from mambalm.models.loading import convert
from tests.models.tiny import STOCK


@pytest.mark.parametrize("name", STOCK)
def test_transformers_loads_what_was_saved(name: str, tmp_path: Path) -> None:
    """Where a configuration says that it rescales, transformers rescales what it loads."""
    family = STOCK[name]
    model = family.model(rescale_prenorm_residual=True)
    model.save_pretrained(tmp_path / "saved")
    assert model.config.rescale_prenorm_residual, "the model itself is as it was"
    convert(tmp_path / "saved", tmp_path / "converted")
    # One that says so, as others write it.
    text = (tmp_path / "saved" / "config.json").read_text()
    (tmp_path / "saved" / "config.json").write_text(text.replace('residual": false', 'residual": true'))
    convert(tmp_path / "saved", tmp_path / "again")
    model.save_pretrained(tmp_path / "saved", max_shard_size="1KB")
    assert family.stock is not None
    for folder in ("saved", "converted", "again"):
        loaded = family.stock.from_pretrained(tmp_path / folder).state_dict()
        for found in (loaded, mambalm.load(tmp_path / folder).state_dict()):
            assert all(torch.equal(found[key], value) for key, value in model.state_dict().items()), folder
