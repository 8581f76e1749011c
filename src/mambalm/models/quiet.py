"""What transformers, and optional libraries that it imports, print beside what was asked for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# torchao and bitsandbytes warn of extensions that nobody asked for, and torchao makes torch's pytree warn of it.
NOISY = ("bitsandbytes", "torchao", "torch.utils._pytree")


def quieten() -> None:
    """Let them log errors only, from now on; and PEFT ask transformers by an old name without a warning."""
    _raise_levels()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _raise_levels() -> None:
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quietly() -> Iterator[None]:
    """Let them log errors only, within."""
    levels = {name: logging.getLogger(name).level for name in NOISY}
    _raise_levels()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' bars for reading and writing weights out of ours, within."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
