"""The GPU kernels of ssd compile for every supported kind of GPU, on a machine without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("target", ["89", "90", "100", "gfx942"])
def test_kernels_compile(target: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.ops.compile_ssd", target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
