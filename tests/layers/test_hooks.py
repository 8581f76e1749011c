"""Hooks of every module count as a module's own: nothing is computed past them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn
from torch.nn.modules import module as every

from mambalm.generation.cpu_step import refusal
from mambalm.layers.hooks import hooked, sharded
from mambalm.ops import use_backend
from tests.helpers import FLOAT32, relative_error
from tests.models.tiny import FAMILIES, tokens


@contextmanager
def everywhere(register: Callable[[Any], Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "register",
    [
        every.register_module_forward_hook,
        every.register_module_forward_pre_hook,
        every.register_module_full_backward_hook,
        every.register_module_full_backward_pre_hook,
    ],
)
def test_a_hook_of_every_module_is_one_of_each(register: Callable[[Any], Any]) -> None:
    module = nn.Linear(2, 2)
    assert not hooked(module)
    with everywhere(register, lambda *_: None):
        assert hooked(module)
        assert not sharded(module)
    assert not hooked(module)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_sees_every_projection(name: str) -> None:
    model, ids, seen = FAMILIES[name].model().train(), tokens(2, 5), set()
    with use_backend("portable"), everywhere(every.register_module_forward_hook, lambda module, *_: seen.add(module)):
        loss = model(ids, labels=ids, skip_logits=True).loss
        assert refusal(model), "the decode step of a CPU calls no module"
    projections = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [name for name in projections if model.get_submodule(name) not in seen] == []
    with use_backend("portable"):
        assert relative_error(model(ids, labels=ids).loss, loss.double()) < FLOAT32
