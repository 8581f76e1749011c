"""What conftest.py promises to every test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def test_uninitialised_memory_is_poisoned() -> None:
    assert torch.empty(8).isnan().all()


def test_a_module_whose_extra_is_missing_is_skipped_by_name() -> None:
    # It imports hypothesis only through tests/helpers.py.
    module = "tests/generation/test_engine.py"
    run = f"import pytest; pytest.main(['-p', 'no:cacheprovider', {module!r}])"
    script = f"import sys; sys.modules['hypothesis'] = None; {run}"
    # hypothesis' own pytest plugin would import it.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "needs hypothesis: pip install 'mambalm[dev]'" in done.stdout, done.stdout + done.stderr
    assert "1 skipped" in done.stdout
