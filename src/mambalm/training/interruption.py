"""SIGINT and SIGTERM as a request to stop after the step in progress."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Whether the process was asked to stop.

    Attributes:
        signal: the number of the signal that asked; 0 while none has.
    """

    signal: int = 0

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + self.signal

    def __bool__(self) -> bool:
        return self.signal != 0


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside the block, the first SIGINT or SIGTERM only sets the request; the second does what it did before.

    A signal that the process was started to ignore, as a shell starts what it runs in the background, stays ignored.
    To be entered in the main thread, as Python's signal handlers are.
    """
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        _restore()

    def _restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        _restore()
