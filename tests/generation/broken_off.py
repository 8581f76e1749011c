"""Generations that their caller breaks off."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from mambalm.generation import Engine, Settings


class Stopped(Exception):
    """Of a caller."""


ERRORS = [Stopped, KeyboardInterrupt, None]


def break_off(engine: Engine, prompts: Sequence[Tensor], settings: Settings, error: type[BaseException] | None) -> None:
    """Begin to generate; row 0 stops at its first token, at row 1's the caller raises. None: it goes away before."""

    def raises(row: int) -> bool:
        if error is not None and row == 1:
            raise error
        return row == 0

    broken = engine.generate(prompts, settings, raises)
    if error is None:
        next(broken)
        del broken
    else:
        with pytest.raises(error):
            list(broken)
