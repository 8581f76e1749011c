"""Every op's GPU kernels compile for every supported kind of GPU with the oldest supported Triton, without a GPU; the
installed one's turn is in ``test_*_compiles.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.ops.triton_versions import OLDEST, compile_with, install, numbers


@pytest.mark.slow
def test_kernels_compile_with_the_oldest_triton(tmp_path: Path) -> None:
    """The install is kept in the virtual environment: it is 180 MB."""
    version = ".".join(map(str, OLDEST))
    kept = Path(sys.prefix) / "triton-versions" / version
    if not kept.exists():
        if (reason := install(version, tmp_path / version)) is not None:
            pytest.skip(f"the package index gives no triton {version}: {reason}")
        kept.parent.mkdir(exist_ok=True)
        os.rename(tmp_path / version, kept)
    done = compile_with(kept)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Triton {version}" in done.stdout


def test_versions_are_ordered_by_their_numbers() -> None:
    assert OLDEST < numbers("3.10.0") < numbers("3.10.1+git2a3b")
