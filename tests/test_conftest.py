"""What conftest.py promises to every test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_uninitialised_memory_is_poisoned() -> None:
    assert torch.empty(8).isnan().all()


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("hypothesis", "tests/data/test_permutation.py"),
        ("pydantic", "tests/training/test_recipe.py"),  # by way of mambalm.training.recipe
        ("typer", "tests/cli/test_chat.py"),  # by way of mambalm.cli.chat
    ],
)
def test_a_module_whose_package_is_missing_is_skipped_by_name(package: str, module: str) -> None:
    done = collect(module, missing=[package])
    assert f"needs {package}: pip install 'mambalm[dev]'" in done.stdout, done.stdout + done.stderr
    assert "no tests collected" in done.stdout


def test_everything_collects_without_what_a_gpu_machine_may_lack() -> None:
    """`make test-gpu` runs with that machine's own packages."""
    missing = ["datasets", "datatrove", "orjson", "pyarrow", "pydantic", "tensorboard", "typer", "zstandard"]
    done = collect("tests", missing=missing)
    assert done.returncode == 0, done.stdout + done.stderr
    modules = [str(module.relative_to(ROOT)) for module in ROOT.glob("tests/**/test_*_gpu.py")]
    assert len(modules) > 5
    assert not [module for module in modules if f"{module}::" not in done.stdout]


def collect(*paths: str, missing: list[str]) -> subprocess.CompletedProcess[str]:
    """What pytest finds in a process that cannot import some packages."""
    hide = f"sys.modules.update(dict.fromkeys({missing!r}))"
    run = f"sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *{paths!r}]))"
    # hypothesis' own pytest plugin would import it.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    script = f"import sys; {hide}; import pytest; {run}"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
