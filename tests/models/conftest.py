"""What the tests of the models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mambalm
from mambalm import ops


@pytest.fixture
def portable() -> Iterator[None]:
    """The portable backend: the backends are held to each other in tests/ops, and this one compiles nothing."""
    with ops.use_backend("portable"):
        yield


@pytest.fixture
def registered() -> Iterator[None]:
    """`mambalm.register()`, taken back afterwards: it is for the process."""
    contents = [auto._model_mapping._extra_content for auto in (AutoModel, AutoModelForCausalLM)]
    contents.append(CONFIG_MAPPING._extra_content)
    before = [dict(content) for content in contents]
    mambalm.register()
    yield
    for content, old in zip(contents, before, strict=True):
        content.clear()
        content.update(old)
