"""Files and checkpoints that are either the old ones or the new ones, whenever the process is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mambalm.models.formats.io import flush
from mambalm.models.quiet import without_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of ``path`` once it is complete and on the disk.

    Raises:
        OSError: it could not be written; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.incomplete")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    # torch's writer reports a full disk as a RuntimeError.
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}; an older version of it is intact") from error


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a checkpoint in transformers' format; a folder that held one of the same model holds one at any moment.

    That is why the model must fit into one file of weights, as any of less than 50 GB does.

    Raises:
        OSError: it could not be written; what the folder held is intact.
    """
    incomplete = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    try:
        with without_bars():
            model.save_pretrained(incomplete)
        tokenizer.save_pretrained(incomplete)
        for file in incomplete.iterdir():
            flush(file)
        if not folder.exists():
            os.rename(incomplete, folder)
            return
        for file in sorted(incomplete.iterdir()):
            os.replace(file, folder / file.name)
        incomplete.rmdir()
    except OSError as error:
        raise OSError(f"cannot write the checkpoint {folder}: {error}; an older one there is intact") from error
