"""State files: a snapshot as one safetensors file that is either whole or not there, and refuses what does not fit.

docs/sessions.md describes the format.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mambalm.generation.fingerprint import Fingerprint
from mambalm.generation.snapshot import Snapshot
from mambalm.models.formats.io import CheckpointError, flush, read_metadata, read_safetensors, save_tensors

if TYPE_CHECKING:
    from mambalm.models.common import MambalmForCausalLM

FORMAT = "mambalm state"
VERSION = 1
# A temporary file that old was left by a process that was killed.
STALE_SECONDS = 3600.0


class StateFileError(ValueError):
    """A state file cannot be used; the message names the file, the reason and the remedy."""


def save(path: Path, snapshot: Snapshot, fingerprint: Fingerprint, notes: Mapping[str, Any] | None = None) -> None:
    """Write a snapshot; a file of that name is replaced when the new one is on the disk, and not before.

    Of several that write one file at once the last wins. A link stays one, and what it points to is replaced.

    Args:
        path: the file.
        snapshot: what to write, bit for bit.
        fingerprint: of the model and tokenizer that made it.
        notes: what the caller wants back from `load`, as JSON has it.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    named = {f"state.{name}": tensor for name, tensor in _named(snapshot.state) if tensor is not None}
    named |= {"counts": snapshot.counts, "fingerprint.samples": fingerprint.samples}
    if snapshot.logits is not None:
        named["logits"] = snapshot.logits
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in named.items()
    }
    content = json.dumps(
        {
            "fingerprint": fingerprint.to_json(),
            "digest": snapshot.digest.hex(),
            "notes": dict(notes or {}),
            "tensors": _described(tensors),
            "crc32": _checksum(tensors),
        }
    )
    metadata = {"format": FORMAT, "version": str(VERSION), "content": content, "crc32": str(_crc32(content))}
    path = path.resolve()
    # A folder, since safetensors has a temporary file of its own.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.incomplete")
    try:
        temporary.mkdir()
        save_tensors(temporary / path.name, tensors, metadata)
        flush(temporary / path.name)
        os.replace(temporary / path.name, path)
        flush(path.parent)
        _clear(path, STALE_SECONDS)
    except Exception as error:
        raise OSError(f"cannot write {path} ({error}); what was there is intact") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(
    path: Path, model: MambalmForCausalLM, fingerprint: Fingerprint, *, convert: bool = False
) -> tuple[Snapshot, dict[str, Any]]:
    """Read a snapshot and the notes written with it; on a CPU its tensors are the file's pages.

    Args:
        path: the file.
        model: the model that is to read on, for the form and place of its state.
        fingerprint: of that model and its tokenizer.
        convert: accept a state from another kind of device or from parameters of another dtype.

    Raises:
        StateFileError: the file is damaged, is no state file, is of a newer version, or of another model or tokenizer.
        FileNotFoundError: there is no such file.
    """
    content, tensors = _read(path)
    there = Fingerprint.from_json(content["fingerprint"], tensors["fingerprint.samples"])
    if difference := next(there.differences(fingerprint, convert=convert), None):
        raise StateFileError(f"{path} does not fit: {difference}")
    form = model.init_state(1, device="meta")
    placed: list[Tensor | None] = []
    for name, wanted in _named(form):
        tensor = None if wanted is None else tensors[f"state.{name}"]
        dtype = wanted.dtype if wanted is not None and convert else None
        # A copy: mapped from the file, tensors lie less aligned, and libraries may then sum in another order.
        placed.append(None if tensor is None else tensor.to(model.device, dtype, copy=True))
    state = pytree.tree_unflatten(placed, pytree.tree_structure(form))
    logits = tensors.get("logits")
    logits = None if logits is None else logits.to(model.device)
    return Snapshot(state, logits, tensors["counts"], bytes.fromhex(content["digest"])), content["notes"]


def remove(path: Path) -> None:
    """Delete a state file if it is there, and what a `save` left that was killed."""
    path.unlink(missing_ok=True)
    _clear(path.resolve(), 0)


def _clear(path: Path, seconds: float) -> None:
    """Delete what saves of a file left that were killed so long ago."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.incomplete"):
        # Another process may be doing the same.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime >= seconds:
                shutil.rmtree(left, ignore_errors=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked content of a file of our format and version."""
    try:
        tensors = read_safetensors(path)
        metadata = read_metadata(path)
    except CheckpointError as error:
        raise StateFileError(str(error)) from error
    if metadata.get("format") != FORMAT:
        raise StateFileError(
            f"{path} is a safetensors file but no state file: write one with `mambalm read` or Session.save"
        )
    version = metadata.get("version", "")
    if version.isdecimal() and int(version) > VERSION:
        raise StateFileError(
            f"{path} is a state file of version {version}, and this mambalm knows up to {VERSION}: update mambalm"
        )
    text = metadata.get("content", "")
    checksum, described = str(_crc32(text)), _described(tensors)
    try:
        content = json.loads(text)
        # Files of earlier days tell neither the checksum of the content nor dtypes and shapes.
        expected = metadata.get("crc32", checksum), content.get("tensors", described), content["crc32"]
    except (AttributeError, KeyError, ValueError):
        expected = None
    if not version.isdecimal() or expected != (checksum, described, _checksum(tensors)):
        raise StateFileError(f"{path} is damaged, its checksum does not fit: copy it again, or read the text again")
    return content, tensors


def _named(state: Any) -> list[tuple[str, Tensor | None]]:
    """The tensors of a state by where they are in it, such as layers[0].conv; None for those that a layer has not."""
    return [(pytree.keystr(path).removeprefix("."), leaf) for path, leaf in pytree.tree_flatten_with_path(state)[0]]


def _described(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """The dtype and shape of each, as JSON has them."""
    return {name: [str(tensors[name].dtype), list(tensors[name].shape)] for name in sorted(tensors)}


def _crc32(text: str) -> int:
    return zlib.crc32(text.encode())


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return value
