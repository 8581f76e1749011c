"""`python -m tests.ops.triton_versions [VERSION ...]`: compiles the kernels of every op, without a GPU.

Without a version, with the Triton that Python finds; with versions, or `all` from 3.6 to the installed one, in turn
with each in an install that is thrown away. An op's kernels are listed by its ``compile_*.py`` beside this file, whose
``main`` takes a target and raises if a kernel does not compile for it.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = ("80", "89", "90", "100", "gfx942")
OLDEST = (3, 6, 0)


def compile_everything() -> None:
    """Every op's kernels for every target; an exception is the failure."""
    import triton

    for path in sorted(Path(__file__).parent.glob("compile_*.py")):
        program = importlib.import_module(f"tests.ops.{path.stem}")
        for target in TARGETS:
            start = time.monotonic()
            program.main(target)
            print(f"Triton {triton.__version__}: {path.stem} {target} in {time.monotonic() - start:.1f} s", flush=True)


def install(version: str, folder: Path) -> str | None:
    """Put that Triton into ``folder``; None, or why the index does not give it."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--target", str(folder), f"triton=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def compile_with(folder: Path | None) -> subprocess.CompletedProcess[str]:
    """``compile_everything`` in a process of its own, because Triton's interpreter, under which the other tests run, is
    chosen when a kernel is defined; with the Triton in ``folder``, if given."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", __spec__.name if __name__ == "__main__" else __name__]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def known_versions() -> list[str]:
    """The versions of the index from the oldest that is supported to the installed one."""
    import triton

    command = [sys.executable, "-m", "pip", "index", "versions", "triton"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.*)", listed)
    if found is None:
        raise SystemExit(f"the package index lists no versions of triton: {listed}")
    newest = numbers(triton.__version__)
    return [version for version in reversed(found[1].split(", ")) if OLDEST <= numbers(version) <= newest]


def numbers(version: str) -> tuple[int, ...]:
    """ "3.6.0+git" as (3, 6, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def main(versions: list[str]) -> None:
    """Compile with each version; the exit status says whether all could."""
    failed = []
    for version in known_versions() if versions == ["all"] else versions:
        with tempfile.TemporaryDirectory() as folder:
            if (reason := install(version, Path(folder))) is not None:
                raise SystemExit(f"triton {version} cannot be installed: {reason}")
            done = compile_with(Path(folder))
        print(done.stdout, end="")
        if done.returncode:
            failed.append(version)
            print(done.stderr[-3000:], file=sys.stderr)
    if failed:
        raise SystemExit(f"kernels do not compile with Triton {', '.join(failed)}")


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1:])
    else:
        compile_everything()
