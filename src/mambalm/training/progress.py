"""Progress of a run on the terminal: a bar where there is one, a line now and then where output goes to a file."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

# Seconds between the lines that stand for the bar.
_LINE_EVERY = 10.0


class ProgressBar:
    """A bar with a text behind it, as a context manager."""

    def __init__(self, console: Console, title: str) -> None:
        """Draw on ``console`` under ``title`` from the start of the block."""
        self._console = console
        self._title = title
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=None, text="")
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, fraction: float | None, text: str) -> None:
        """Show how much is done, from 0 to 1 (None: nobody knows), and ``text``."""
        self._bar.update(self._task, completed=fraction or 0.0, total=None if fraction is None else 1.0, text=text)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= _LINE_EVERY:
            self._last_line = now
            done = "" if fraction is None else f" {fraction:.0%}"
            self._console.print(f"{self._title}{done} · {text}", highlight=False)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(f"{self._title}: {text}", highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Minutes and seconds, as in 2:05."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes}:{rest:02d}"
