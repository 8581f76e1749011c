"""Writing files, as far as models and formats share it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@contextmanager
def full_disks_told(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Turn what safetensors (and, of `others`, torch) raises on a full disk into the OSError that it is."""
    kinds: tuple[type[Exception], ...] = (OSError, SafetensorError, *others)
    try:
        yield
    except kinds as error:
        raise OSError(f"cannot write {path}: {error}") from error


@contextmanager
def initialised(config: PreTrainedConfig) -> Iterator[None]:
    """Let a configuration be written without `rescale_prenorm_residual`, which says how a new model begins.

    Where it is set, transformers' classes divide every out_proj that they load by the root of the number of layers.
    """
    rescales = getattr(config, "rescale_prenorm_residual", False) and type(config).__module__.startswith(
        "transformers."
    )
    if rescales:
        config.rescale_prenorm_residual = False
    try:
        yield
    finally:
        if rescales:
            config.rescale_prenorm_residual = True


def share(folder: Path, like: str) -> None:
    """Give safetensors' files the permissions of another file of the folder, which was written as any new file.

    It goes by way of a temporary file, which only its owner may read.
    """
    if (folder / like).exists():
        mode = (folder / like).stat().st_mode
        for path in folder.glob("*.safetensors"):
            path.chmod(mode)
