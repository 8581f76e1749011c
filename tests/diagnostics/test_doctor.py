"""`doctor` tells what there is and what is missing."""

from __future__ import annotations

import platform
import re
import shutil
import sysconfig
from collections import Counter
from importlib.metadata import requires
from pathlib import Path

import llvmlite.binding
import pytest
import torch
from typer.testing import CliRunner

from mambalm.diagnostics import doctor
from mambalm.ops import linear, numba_support
from mambalm.ops.backends import OPS
from mambalm_cli import app


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": "train"})
    monkeypatch.setattr(doctor, "devices", dict)
    monkeypatch.setattr(doctor, "products", list)
    monkeypatch.setattr(doctor, "backends", list)
    shown = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["doctor"]).stdout
    assert "not installed: pip install 'mambalm[train]'" in shown
    found = doctor.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["no-such-package"] == "not installed"


def test_the_extras_are_those_of_the_package() -> None:
    declared = {
        (re.split(r"[^\w-]", line)[0], line.partition("extra == ")[2].strip("'\"")) for line in requires("mambalm")
    }
    assert {(name, extra) for name, extra in doctor.OPTIONAL.items() if extra is not None} <= declared


def test_one_backend_of_each_op_and_device_is_chosen_and_the_first_that_can_run() -> None:
    found = list(doctor.backends())
    kinds = {device.type for device in doctor.devices()}
    assert "cpu" in kinds
    chosen = Counter((backend.op, backend.device.type) for backend in found if backend.chosen)
    assert chosen == {(op, kind): 1 for op in OPS for kind in kinds}
    assert all(backend.reason is None for backend in found if backend.chosen)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"cpu": "numba is missing", "portable": None, "reference": None}
    monkeypatch.setattr(doctor.ops, "explain", lambda op, device: reasons)
    found = [backend for backend in doctor.backends() if backend.device.type == "cpu" and backend.op == "ssd"]
    assert [(backend.name, backend.reason, backend.chosen) for backend in found] == [
        ("cpu", "numba is missing", False),
        ("portable", None, True),
        ("reference", None, False),
    ]


def test_products_name_the_way_taken_and_what_was_measured() -> None:
    for dtype, text in doctor.products():
        way = linear.chosen(getattr(torch, dtype))
        assert text.startswith(f"{way} (")
        assert all(name in text for name in linear.measured(getattr(torch, dtype)))


def test_the_decode_step_says_how_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict(doctor.decoding())
    assert list(found) == ["float32", "bfloat16", "float16", "int8, int4", "threads", "kernels"]
    assert "read where they lie" in found["bfloat16"]
    assert "calling the module: it is torch.float16" in found["float16"]
    assert Path(found["kernels"].removeprefix("kept in ")).is_dir()
    monkeypatch.setattr(numba_support, "pooled", lambda: "no region")
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: {"avx2": True, "avx512vnni": False})
    found = dict(doctor.decoding())
    assert found["threads"] == f"{torch.get_num_threads()}, a pool's: no region"
    assert found["int8, int4"].endswith("vpmaddwd (AVX2)")


def test_the_compiler_and_what_needs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert doctor.compiler() == "/usr/bin/gcc, with Python's headers"
    (tmp_path / "Python.h").unlink()
    assert "Python.h is missing. Triton's first launch and torch.compile" in doctor.compiler()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "none found (looked for cc, gcc" in doctor.compiler()
