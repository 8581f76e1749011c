"""The states of a run: written in the background by all ranks together, complete or not there, read on any number."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from mambalm.models.formats.io import flush

_PROGRESS = "progress.pt"
# Under adapters the weights beneath stay those of the checkpoint that the run starts from.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class _KeptStager(DefaultStager):
    """One that serves many checkpoints, in the same memory.

    torch 2.11 closes a stager after its first checkpoint, and the copier in it after every one; later versions close
    only what they have made.
    """

    def __init__(self, options: StagingOptions) -> None:
        super().__init__(options)
        self._state_dict_stager.close = self.close  # type: ignore[method-assign]

    def close(self) -> None:
        """Nothing: it goes with the checkpoints that it serves."""


class Checkpoints:
    """Checkpoints of a run in a folder, step-N each.

    One is written beside its place and moved there when all of it is on the disk: whenever the run is killed, the
    latest is whole.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_every: int = 0, read_only: bool = False) -> None:
        """Keep the latest ``keep_last``, and besides every one whose step ``keep_every`` (0: nothing) divides.

        ``read_only``: of a run that may be going on, in whose folder nothing is mended.
        """
        self._folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._writing: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None
        self._stager: DefaultStager | None = None
        self._preparing: Future[None] | None = None
        self._interval = sys.getswitchinterval()
        # A single process is meant, also in DCP's thread.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        # Killed between moving an old checkpoint aside and its successor into the place: the old one is the last.
        for aside in () if read_only else folder.glob(".step-*.replaced"):
            place = folder / aside.name.removeprefix(".").removesuffix(".replaced")
            with contextlib.suppress(OSError):  # another rank was faster
                if not place.exists():
                    aside.rename(place)

    def steps(self) -> list[int]:
        """The steps of those that are there."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self._folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> int | None:
        """The last step of which there is one, the same on every rank: to be asked by all of them."""
        return _agreed(max(self.steps(), default=None))

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is on its way to the disk."""
        return self._writing is not None and not self._writing.done()

    @property
    def is_preparing(self) -> bool:
        """Whether memory is still being made."""
        return self._preparing is not None and not self._preparing.done()

    @property
    def has_failed(self) -> bool:
        """Whether the one on its way could not be written, as far as this rank knows: `wait` tells all of them."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def prepare(self, state: dict[str, Any], device: torch.device) -> None:
        """Make the memory of the host that checkpoints are copied to, in the background: a GPU's, which is pinned.

        Getting it takes a second for each gigabyte, which the first `save` would take instead.
        """
        if device.type == "cpu":
            return
        model, optimizer = _tensors(state)

        def copy() -> None:
            torch.accelerator.set_device_index(device.index or 0)  # a thread begins on the first
            with torch.Stream(device):
                self._staging().stage({"model": model, "optimizer": optimizer})

        self._preparing = ThreadPoolExecutor(1, "checkpoint-memory").submit(copy)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write the model, optimizer and progress of ``state``, as they are now.

        Raises:
            OSError: the one before could not be written, or this one not begun.
        """
        self.wait()
        incomplete = self._folder / f".step-{step}.incomplete"
        problem = None
        if _is_main():
            try:
                self._begin(incomplete, state["progress"])
            except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
                problem = str(error)
        if problem := _agreed(problem):
            raise OSError(self._failure(problem))
        if self._preparing is not None:
            self._preparing.result()
            self._preparing = None
        model, optimizer = _tensors(state)
        if dist.is_initialized() and self._group is None:
            # Of its own: its messages must not meet those of the steps that go on meanwhile.
            self._group = dist.new_group(backend="gloo")
        # What writes is Python for a part, and would have the interpreter for so long each time that a step needs it.
        sys.setswitchinterval(self._interval / 10)
        written = dcp.async_save(
            {"model": model, "optimizer": optimizer},
            checkpoint_id=incomplete,
            process_group=self._group,
            async_stager=self._staging(),
        )
        assert not isinstance(written, AsyncSaveResponse)
        writing = self._writing = Future()
        written.add_done_callback(lambda done: self._finish(writing, done, step, incomplete))

    def wait(self) -> None:
        """Until what is being written is in its place; to be called by all ranks.

        Raises:
            OSError: it could not be written; the one before it is intact.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        error = writing.exception()
        if problems := _gathered(None if error is None else _reason(error)):
            raise OSError(self._failure(problems[0])) from error

    def load(self, state: dict[str, Any], step: int | None = None) -> None:
        """Read a checkpoint, by default the latest, into the model and the optimizer, and its progress into ``state``.

        Raises:
            ValueError: there is none, or it is damaged or of another model; parameters may have changed by then.
        """
        step = self.latest() if step is None else step
        model, optimizer = _tensors(state)
        kept: dict[str, Any] = {"model": model, "optimizer": optimizer}
        progress = self._read(kept, step)
        set_state_dict(
            state["model"],
            state["optimizer"],
            model_state_dict=kept["model"],
            optim_state_dict=kept["optimizer"],
            options=_TRAINED,
        )
        state["progress"] = progress

    def load_model(self, model: nn.Module, step: int | None = None) -> None:
        """Read the model alone from a checkpoint, by default the latest.

        Raises:
            ValueError: as `load`.
        """
        kept = {"model": _of_trained(model, get_model_state_dict(model, options=_TRAINED))}
        self._read(kept, self.latest() if step is None else step)
        set_model_state_dict(model, kept["model"], options=_TRAINED)

    def _read(self, kept: dict[str, Any], step: int | None) -> Any:
        """Read what ``kept`` names from the checkpoint of a step into its tensors; returns the progress."""
        path = self._folder / f"step-{step}"
        if not path.is_dir():
            others = f"those there are of steps {self.steps()}" if self.steps() else "none is there"
            raise ValueError(f"there is no checkpoint {path}; {others}")
        try:
            sizes = _sizes(path)
        # What is raised depends on which part of it is damaged.
        except (Exception, CheckpointException) as error:
            raise ValueError(self._damage(path, error)) from error
        _require_same(path, sizes, kept["model"])
        try:
            dcp.load(kept, checkpoint_id=path)
            return torch.load(path / _PROGRESS, map_location="cpu", weights_only=True)
        except (Exception, CheckpointException) as error:
            raise ValueError(self._damage(path, error)) from error

    def _staging(self) -> DefaultStager:
        """What copies to the host: on a GPU into pinned memory that is kept, since getting it takes longer."""
        if self._stager is None:
            fast = torch.accelerator.is_available()
            self._stager = _KeptStager(
                StagingOptions(
                    use_pinned_memory=fast,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=fast,
                )
            )
        return self._stager

    def _begin(self, incomplete: Path, progress: Any) -> None:
        """Clear away what killed runs left, and make the new one's folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(".step-*"):
            shutil.rmtree(left)
        incomplete.mkdir()
        torch.save(progress, incomplete / _PROGRESS)

    def _finish(self, writing: Future[None], done: Future[Any], step: int, incomplete: Path) -> None:
        """In the writing thread: put the checkpoint into its place, and remove those that need not be kept."""
        sys.setswitchinterval(self._interval)
        try:
            done.result()
            if _is_main():
                self._place(step, incomplete)
        except BaseException as error:
            shutil.rmtree(incomplete, ignore_errors=True)
            writing.set_exception(error)
        else:
            writing.set_result(None)

    def _place(self, step: int, incomplete: Path) -> None:
        for file in incomplete.iterdir():
            flush(file)
        place = self._folder / f"step-{step}"
        if place.exists():  # after a return to an earlier checkpoint its step may come again
            place.rename(self._folder / f".step-{step}.replaced")
        incomplete.rename(place)
        flush(self._folder)
        for old in self.steps()[: -self._keep_last]:
            if not self._keep_every or old % self._keep_every:
                # Renamed first: a checkpoint of which a part is removed must not look like one.
                os.replace(self._folder / f"step-{old}", self._folder / f".step-{old}.removed")
        for left in [*self._folder.glob(".step-*.removed"), *self._folder.glob(".step-*.replaced")]:
            shutil.rmtree(left)

    def _failure(self, reason: str) -> str:
        kept = f"those of steps {self.steps()} are intact" if self.steps() else "none was written before"
        free = f", where {shutil.disk_usage(self._folder).free / 1e9:.2f} GB are free" if self._folder.exists() else ""
        return f"cannot write a checkpoint into {self._folder}{free}: {reason}; {kept}"

    def _damage(self, path: Path, error: BaseException) -> str:
        others = [f"step-{step}" for step in self.steps() if path.name != f"step-{step}"]
        return (
            f"the checkpoint {path} is damaged ({_reason(error)}): remove it to go on from "
            f"{others[-1] if others else 'the beginning'}"
        )


def _tensors(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trained parameters and the optimizer's, by name."""
    begun = bool(state["optimizer"].state)
    model, optimizer = get_state_dict(state["model"], state["optimizer"], options=_TRAINED)
    if not begun:
        # torch makes the optimizer's tensors by a step without gradients, which AdamW would count.
        for kept in state["optimizer"].state.values():
            kept["step"].zero_()
    return _of_trained(state["model"], model), optimizer


def _of_trained(model: nn.Module, tensors: dict[str, Any]) -> dict[str, Any]:
    """Without frozen parameters: torch keeps the second name of a tied one, and what quantisers write beside one."""
    network = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    named = network.named_parameters(remove_duplicate=False)
    frozen = tuple(f"{name}." for name, parameter in named if not parameter.requires_grad)
    return {name: tensor for name, tensor in tensors.items() if not f"{name}.".startswith(frozen)}


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _agreed(value: Any) -> Any:
    """The main rank's value, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _gathered(problem: str | None) -> list[str]:
    """The problems of all ranks, on every rank."""
    if not dist.is_initialized():
        return [] if problem is None else [problem]
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return [each for each in found if each is not None]


def _reason(error: BaseException) -> str:
    """The last line of an error: DCP puts a trace of every rank in front of it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _sizes(path: Path) -> dict[str, torch.Size]:
    """The sizes of the model's tensors in a checkpoint, by name."""
    found = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    model = {name.removeprefix("model."): entry for name, entry in found.items() if name.startswith("model.")}
    return {name: entry.size for name, entry in model.items() if hasattr(entry, "size")}


def _require_same(path: Path, found: Mapping[str, torch.Size], model: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model before anything is read, and say what differs."""
    here = {name: value.shape for name, value in model.items()}
    if missing := sorted(here.keys() ^ found.keys()):
        raise ValueError(f"the checkpoint {path} is of another model: only one of them has {', '.join(missing[:3])}")
    for name, shape in here.items():
        if found[name] != shape:
            kind = "vocabulary" if "embeddings" in name or "lm_head" in name else "model"
            raise ValueError(
                f"the checkpoint {path} is of another {kind}: {name} is {tuple(found[name])} there and {tuple(shape)} "
                "here. Use the recipe and tokenizer that it was made with, or another folder"
            )
