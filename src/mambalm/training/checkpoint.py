"""The states of a run: written in the background by all ranks together, complete or not there, read on any number."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mambalm.models.formats.io import flush

_PROGRESS = "progress.pt"


class Checkpoints:
    """Checkpoints of a run in a folder, step-N each.

    One is written beside its place and moved there when all of it is on the disk: whenever the run is killed, the
    latest is whole.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_every: int = 0) -> None:
        """Keep the latest ``keep_last``, and besides every one whose step ``keep_every`` (0: nothing) divides."""
        self._folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._writing: Future[None] | None = None

    def steps(self) -> list[int]:
        """The steps of those that are there."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self._folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> int | None:
        """The last step of which there is one."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write the model, optimizer and progress of ``state``, as they are now.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        main = not dist.is_initialized() or dist.get_rank() == 0
        incomplete = self._folder / f".step-{step}.incomplete"
        if main:
            shutil.rmtree(incomplete, ignore_errors=True)
            incomplete.mkdir(parents=True)
            torch.save(state["progress"], incomplete / _PROGRESS)
        if dist.is_initialized():
            dist.barrier()
        model, optimizer = get_state_dict(state["model"], state["optimizer"])
        with _quiet():
            written: Any = dcp.async_save({"model": model, "optimizer": optimizer}, checkpoint_id=incomplete)
        writing = self._writing = Future()
        written.add_done_callback(lambda done: self._finish(writing, done, step, incomplete, main))

    def wait(self) -> None:
        """Until what is being written is in its place.

        Raises:
            OSError: it could not be written; the one before it is intact.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        # What DCP raises depends on which rank and file failed.
        except (Exception, CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise OSError(f"cannot write a checkpoint into {self._folder}: {reason}; the last one is intact") from error

    def load(self, state: dict[str, Any], step: int | None = None) -> None:
        """Read a checkpoint, by default the latest, into the model and the optimizer, and its progress into ``state``.

        Raises:
            ValueError: there is none, or it is damaged or of another model.
        """
        step = self.latest() if step is None else step
        path = self._folder / f"step-{step}"
        if not path.is_dir():
            raise ValueError(f"there is no checkpoint {path}; those there are of steps {self.steps() or 'none'}")
        model, optimizer = get_state_dict(state["model"], state["optimizer"])
        kept: dict[str, Any] = {"model": model, "optimizer": optimizer}
        try:
            with _quiet():
                dcp.load(kept, checkpoint_id=path)
            progress = torch.load(path / _PROGRESS, map_location="cpu", weights_only=True)
        # What is raised depends on which part of it is damaged.
        except (Exception, CheckpointException) as error:
            others = [other for other in self.steps() if other != step]
            raise ValueError(
                f"the checkpoint {path} is damaged or of another model: remove it to go on from another "
                f"({others or 'none'})"
            ) from error
        set_state_dict(
            state["model"],
            state["optimizer"],
            model_state_dict=kept["model"],
            optim_state_dict=kept["optimizer"],
        )
        state["progress"] = progress

    def _finish(self, writing: Future[None], done: Any, step: int, incomplete: Path, main: bool) -> None:
        """In the writing thread: put the checkpoint into its place, and remove those that need not be kept."""
        try:
            done.result()
            if main:
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
        # After a return to an earlier checkpoint its step may come again.
        shutil.rmtree(place, ignore_errors=True)
        os.rename(incomplete, place)
        flush(self._folder)
        for old in self.steps()[: -self._keep_last]:
            if not self._keep_every or old % self._keep_every:
                shutil.rmtree(self._folder / f"step-{old}")


@contextlib.contextmanager
def _quiet() -> Any:
    """Without DCP's warning that a single process saves alone, which is meant."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed.checkpoint")
        yield
