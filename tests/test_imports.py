"""Importing: everything imports with the minimal dependencies, and `import mambalm` does nothing but register ops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
# What only an extra brings; hidden, `import` and `find_spec` find none of them.
HIDDEN = (
    "bitsandbytes",
    "datasets",
    "datatrove",
    "hypothesis",
    "lm_eval",
    "orjson",
    "peft",
    "pyarrow",
    "pydantic",
    "torchao",
    "triton",
    "zstandard",
)

EVERY_MODULE = f"""
import sys
for name in {HIDDEN!r}:
    sys.modules[name] = None
import importlib, pkgutil
import mambalm
for module in pkgutil.walk_packages(mambalm.__path__, "mambalm."):
    # The Triton backends are imported when chosen, and refused with the reason without Triton; a recipe is pydantic's,
    # and the harness's model the harness's.
    left_out = ("triton", "gluon", "_launch", "__main__")
    others = ("mambalm.training.recipe", "mambalm.evaluation.harness")
    if module.name not in others and not any(word in module.name.rpartition(".")[2] for word in left_out):
        importlib.import_module(module.name)
        print(module.name)
"""

IMPORT_ALONE = """
import sys, torch
import mambalm
from mambalm.ops.backends import OPS
heavy = [name for name in ("accelerate", "matplotlib", "numba", "transformers", "triton") if name in sys.modules]
assert not heavy, heavy
assert not torch.cuda.is_initialized()
assert mambalm.State.__name__ == "State"
for op in OPS:
    assert hasattr(torch.ops.mambalm, op), f"torch.ops.mambalm.{op} is not registered"
"""


QUIET = """
import logging
from mambalm.models.quiet import NOISY
before = [logging.getLogger(name).level for name in NOISY]
from mambalm.models import load
import sys
assert "torchao" in sys.modules
assert [logging.getLogger(name).level for name in NOISY] == before
"""


def run(script: str, cwd: Path) -> str:
    """Run a script in a process of its own, at home in `cwd`, and return what it printed."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(cwd),
        "PYTHONPATH": str(SOURCE),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_every_module_imports_with_the_minimal_dependencies(tmp_path: Path) -> None:
    imported = run(EVERY_MODULE, tmp_path).split()
    assert {"mambalm.cli.generate", "mambalm.models.loading", "mambalm.ops.selective_scan.reference"} <= set(imported)


def test_importing_mambalm_registers_its_ops_and_nothing_else(tmp_path: Path) -> None:
    run(IMPORT_ALONE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_loading_is_quiet_about_torchaos_extensions(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    assert run(QUIET, tmp_path) == ""


def test_help_needs_no_torch(tmp_path: Path) -> None:
    script = """
import sys
sys.argv = ["mambalm", "--help"]
from mambalm_cli import main
try:
    main()
except SystemExit as exit:
    assert exit.code == 0
assert "torch" not in sys.modules and "mambalm" not in sys.modules
"""
    assert "generate" in run(script, tmp_path)


def test_the_help_of_a_command_needs_no_model(tmp_path: Path) -> None:
    script = """
import sys
from mambalm_cli import main
for command in ("generate", "read", "chat", "evaluate"):
    sys.argv = ["mambalm", command, "--help"]
    try:
        main()
    except SystemExit as exit:
        assert exit.code == 0
assert "transformers.modeling_utils" not in sys.modules and "numba" not in sys.modules
"""
    assert "--temperature" in run(script, tmp_path)
