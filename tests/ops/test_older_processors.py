"""What a processor without AVX-512 would do: kernels compiled for AVX2 alone, oneDNN kept from more."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
PRODUCTS = """
import torch
from mambalm.ops.linear import _onednn, chosen, linear
x, weight = torch.randn(3, 40), torch.randn(8, 40)
assert (linear(x, weight) - x @ weight.T).norm() < 1e-5 * (x @ weight.T).norm()
half = linear(x.bfloat16(), weight.bfloat16()).float()
assert (half - x @ weight.T).norm() < 1e-2 * (x @ weight.T).norm()
try:
    _onednn(x.bfloat16(), weight.bfloat16(), None)
except RuntimeError:
    print(chosen(torch.bfloat16))
"""

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is x86's")


def run(command: list[str], cache: Path) -> str:
    variables = os.environ | AVX2 | {"NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_products_do_without_what_onednn_refuses(tmp_path: Path) -> None:
    assert run(["-c", PRODUCTS], tmp_path).strip() in ("", "bfloat16", "float32")


@pytest.mark.slow
def test_kernels_on_avx2(tmp_path: Path) -> None:
    files = [f"tests/ops/test_{name}.py" for name in ("numba_support", "numba_team", "numba_products", "rms_norm")]
    options = ["-q", "-p", "no:cacheprovider", "-k", "not gpu and not triton"]
    assert " passed" in run(["-m", "pytest", *files, *options], tmp_path)
