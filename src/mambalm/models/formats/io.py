"""The files that checkpoints are made of: read through memory maps, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambalm.models.writing import full_disks_told

# As transformers wrote them for years: what fits is one file, and writing needs little more memory than one shard.
SHARD_SIZE = "5GB"


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names the file or the tensor, and the remedy."""


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies: its folder and, if the user named one file of it, that file."""

    folder: Path
    weights: Path | None = None

    @classmethod
    def at(cls, path: Path) -> Source:
        """The source that `path` names: a folder, its configuration or a file of weights."""
        if path.is_dir():
            return cls(path)
        return cls(path.parent, None if path.suffix == ".json" else path)

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in the folder's file `name`, or None if there is no such file."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    def files(self, stem: str, suffix: str) -> list[Path]:
        """The files of weights called `stem` + `suffix`: one, or the shards that an index or their numbers tell.

        Raises:
            CheckpointError: the index names a shard that is not there.
        """
        if (named := self.weights) is not None:
            return [named] if named.name.startswith(stem) and named.suffix == suffix else []
        single, index = self.folder / f"{stem}{suffix}", self.folder / f"{stem}{suffix}.index.json"
        if single.is_file():
            return [single]
        if not index.is_file():
            return sorted(self.folder.glob(f"{stem}-*-of-*{suffix}"))
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise CheckpointError(f"{index} has no weight_map of tensors to files: download or copy it again")
        if outside := [name for name in places.values() if Path(name).name != name]:
            raise CheckpointError(
                f"{index} names {outside[0]}, which is no file of its folder: download or copy it again"
            )
        shards = [self.folder / name for name in sorted(set(places.values()))]
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            raise CheckpointError(f"{index} names {', '.join(missing)}, which is not there: download or copy it too")
        return shards


def parse_json(path: Path) -> Any:
    """The value in a JSON file; CheckpointError if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download or write it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError if it is no JSON, or holds something else."""
    content = parse_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as Hugging Face's tools lay it out."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of some files (safetensors or torch), on the CPU, read from disk only when it is used.

    Raises:
        CheckpointError: a file is truncated, is no checkpoint, holds code, or repeats a tensor of another.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        contents = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
        for name, value in contents.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor: save a state dict")
            if name in tensors:
                raise CheckpointError(f"{path} repeats {name!r}: remove the files of another checkpoint")
            tensors[name] = value.detach()
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped (private: writing to them does not change the file).

    Raises:
        CheckpointError: it is truncated, or none.
    """
    _require_whole(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no valid safetensors file ({error}): download or save it again") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in the header of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _require_whole(path: Path) -> None:
    """Raise unless a safetensors file is as long as its header says, naming the first tensor that is cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: its header should end at byte {start}, the file has "
                f"{size}; download or copy it again"
            )
        try:
            header = json.loads(file.read(start - 8))
        except ValueError:
            return  # no safetensors file at all, which the library says better
    for name, entry in header.items() if isinstance(header, dict) else ():
        try:
            end, shape = start + entry["data_offsets"][1], tuple(entry["shape"])
        except (IndexError, KeyError, TypeError):
            continue  # its description of itself, or a damaged one, which the library says better
        if end > size:
            raise CheckpointError(
                f"{path} is truncated: {name} (shape {shape}) should end at byte {end}, the file has {size}; "
                "download or copy it again"
            )


def read_torch(path: Path) -> dict[str, Any]:
    """What `torch.save` put in a file: a mapping of tensors and plain values, memory-mapped; never code.

    Raises:
        CheckpointError: it holds something else, or is damaged.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} is a pickle that runs code or builds objects other than tensors, and is not read; where you trust "
            "it, load it with PyTorch and save the state dict alone, better as safetensors"
        ) from error
    except OSError:
        raise
    except Exception as error:  # which one depends on what of the pickle is damaged
        raise CheckpointError(f"{path} cannot be read: {_fault(path)}") from error
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, not a state dict: save model.state_dict()")
    return dict(contents)


def _fault(path: Path) -> str:
    """Why PyTorch could not read a file, and the remedy."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return "it is not in the zip format of torch.save; load and save it again with PyTorch 1.6 or newer"
    with contextlib.suppress(zipfile.BadZipFile):
        if not zipfile.is_zipfile(path):
            return "it is truncated, its table of tensors at the end is gone; download or copy it again"
    return "a tensor in it is damaged; download or copy it again"


def write_safetensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index when they are larger than `SHARD_SIZE`."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD_SIZE)
    for filename, names in split.filename_to_tensors.items():
        save_tensors(folder / filename, {name: tensors[name].contiguous() for name in names}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, with the permissions of any new file."""
    path.touch()
    mode = path.stat().st_mode
    with full_disks_told(path):
        save_file(dict(tensors), path, metadata=dict(metadata))
    path.chmod(mode)  # safetensors goes by way of a temporary file, which only its owner may read
    if len(metadata) > 1:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Let equal contents be equal files: safetensors writes metadata in an order that differs from run to run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(data) <= size, "both escape no more than JSON asks for"
        file.seek(8)
        file.write(data.ljust(size))


def write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict with `torch.save`, which saves a tensor's whole storage: a part of one is copied first."""
    owned = {n: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for n, t in tensors.items()}
    with full_disks_told(path, RuntimeError):
        torch.save(owned, path)


@contextlib.contextmanager
def written_whole(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder that becomes `destination` when the block ends without an error, and vanishes otherwise.

    Raises:
        CheckpointError: the destination is a file, or a folder with something in it and `overwrite` is not set.
    """
    destination = destination.resolve()  # a link stays one, and what it points to is replaced
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file: name a folder to write the checkpoint to")
    occupied = destination.is_dir() and any(destination.iterdir())
    if occupied and not overwrite:
        raise CheckpointError(f"{destination} is not empty: name another folder, or pass overwrite=True (--overwrite)")
    destination.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    partial = destination.with_name(f".{destination.name}.{token}.partial")
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            flush(path)
        if occupied:
            # A rename cannot replace a folder that has files, so the old one steps aside first.
            replaced = destination.rename(destination.with_name(f".{destination.name}.{token}.replaced"))
            partial.rename(destination)
            shutil.rmtree(replaced)
        else:
            partial.rename(destination)
        flush(destination.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file or a folder's list of files is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such thing as opening a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
