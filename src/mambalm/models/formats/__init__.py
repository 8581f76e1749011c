"""Checkpoint formats, one module each: which one a path holds, and how it is read and written."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mambalm.models.formats import mamba_ssm, mistral, openlm, transformers
from mambalm.models.formats.checkpoint import Checkpoint, require_match
from mambalm.models.formats.io import CheckpointError, Source, written_whole

__all__ = ["FORMATS", "WRITABLE", "Checkpoint", "CheckpointError", "Format", "detect", "require_match", "written_whole"]


class Format(Protocol):
    """What a format's module offers."""

    @property
    def NAME(self) -> str:
        """What the user calls it."""

    def recognises(self, source: Source) -> bool:
        """Whether the source holds this format."""

    def read(self, source: Source) -> Checkpoint:
        """Read the configuration, and the tensors through memory maps."""


class WritableFormat(Format, Protocol):
    """A format that checkpoints are also written in."""

    def write(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write the checkpoint and its companions into an empty folder."""


# The first that recognises a folder reads it: Codestral's repository holds transformers' files beside Mistral's.
FORMATS: tuple[Format, ...] = (transformers, mamba_ssm, mistral, openlm)
WRITABLE: dict[str, WritableFormat] = {format.NAME: format for format in (transformers, mamba_ssm)}


def detect(path: Path) -> tuple[Format, Source]:
    """The format of a folder or of a file of weights.

    Raises:
        CheckpointError: no format is recognised.
    """
    source = Source.at(path)
    for format in FORMATS:
        if format.recognises(source):
            return format, source
    present = ", ".join(sorted(entry.name for entry in source.folder.iterdir())[:10]) or "nothing"
    raise CheckpointError(
        f"{path} is in no known format. Known are config.json with model.safetensors or pytorch_model.bin "
        "(transformers, mamba_ssm), params.json with consolidated.safetensors (Mistral), and a .pt file with its "
        f"model's JSON (OpenLM); {source.folder} holds {present}"
    )
