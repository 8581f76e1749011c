"""What is published: the sdist is the repository, and a wheel built from it is the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def tracked() -> set[str]:
    """The repository's files, but for weights."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    names = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    return {name for name in names if not name.endswith(".safetensors")}


def build(what: str, source: Path, folder: Path) -> Path:
    """Build by the backend that pyproject.toml names, in this environment."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = folder.iterdir()
    return built


def test_the_sdist_is_the_repository_and_its_wheel_the_package(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    names = tracked()
    for name in names:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / "copy" / name)
    (tmp_path / "copy" / "notes.txt").write_text("not the repository's")
    with tarfile.open(build("build_sdist", tmp_path / "copy", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    packed = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {name for name in packed - names if "egg-info" not in name} == {"PKG-INFO", "setup.cfg"}
    assert names <= packed, sorted(names - packed)
    with zipfile.ZipFile(build("build_wheel", source, tmp_path / "wheel")) as wheel:
        modules = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert modules == {name.removeprefix("src/") for name in names if name.startswith("src/")}
