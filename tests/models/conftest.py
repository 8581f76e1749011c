"""What the tests of the models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mambalm import ops


@pytest.fixture
def portable() -> Iterator[None]:
    """The portable backend: the backends are held to each other in tests/ops, and this one compiles nothing."""
    with ops.use_backend("portable"):
        yield
