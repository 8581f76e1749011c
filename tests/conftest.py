"""What every test runs under: fixed seeds, one thread per worker, NaN in uninitialised memory."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# Triton reads this when a kernel is defined, so it is set before anything of mambalm is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

OPTIONAL = ("bitsandbytes", "hypothesis", "peft", "torchao", "triton")


class Module(pytest.Module):
    """A test module that is skipped, by name, when a package of an extra is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        tree = ast.parse(self.path.read_text())
        imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
        tops = {name.partition(".")[0] for name in imported}
        if missing := [name for name in OPTIONAL if name in tops and find_spec(name) is None]:
            pytest.skip(f"needs {', '.join(missing)}: pip install 'mambalm[dev]'")
        return super().collect()


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return Module.from_parent(parent, path=module_path)


def pytest_configure() -> None:
    # Workers share the cores, and at the sizes of these tests one thread is the fastest.
    torch.set_num_threads(1)
    if find_spec("hypothesis") is not None:
        from hypothesis import settings

        settings.register_profile("mambalm", deadline=None, derandomize=True, max_examples=20, print_blob=True)
        settings.load_profile("mambalm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that reading what nothing wrote shows in the result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
