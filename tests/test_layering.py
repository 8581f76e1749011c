"""Who may import whom: the floors of the house (docs/architecture.md), read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mambalm"
MODULES = sorted(SOURCE.rglob("*.py"))

_OPS = {"ops"}
_LAYERS = _OPS | {"layers"}
_MODELS = _LAYERS | {"quantization", "models"}
_RUNNING = _MODELS | {"generation", "training", "data"}
# A room may import itself and these rooms.
BELOW = {
    "ops": set(),
    "layers": _OPS,
    "quantization": _LAYERS,
    "models": _LAYERS | {"quantization"},
    "generation": _MODELS,
    "data": set(),
    "training": _MODELS | {"data"},
    "evaluation": _RUNNING,
    "serving": _RUNNING,
    "diagnostics": _RUNNING | {"evaluation", "serving"},
    "cli": _RUNNING | {"evaluation", "serving", "diagnostics", ""},
}
# What a low room may import from outside of the standard library; the rooms above may import any dependency.
_CHECKPOINTS = {"accelerate", "bitsandbytes", "huggingface_hub", "peft", "safetensors", "torchao", "transformers"}
OUTSIDE = {
    "ops": {"torch"},
    "layers": {"torch"},
    "quantization": {"torch"} | _CHECKPOINTS,
    "models": {"torch"} | _CHECKPOINTS,
    "generation": {"jinja2", "tokenizers", "torch", "transformers"},
}
# Backends alone may import what they run on: a specification needs no kernel library.
KERNEL_LIBRARIES = {"llvmlite", "numba", "numpy", "triton"}
SPECIFICATIONS = {"__init__", "backends", "checks", "interface", "linear_cross_entropy", "portable", "reference"}


def room(path: Path) -> str:
    """The room of a module; "" for the package's own files."""
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of a module, those inside functions too; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import out from mambalm"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(path: Path) -> Iterator[str]:
    """What a module imports against the rules."""
    here = room(path)
    outside = OUTSIDE.get(here)
    if path.stem.startswith("_numba_"):
        outside = {"torch"} | KERNEL_LIBRARIES
    if here == "ops" and path.stem not in SPECIFICATIONS:
        outside = {"torch"} | KERNEL_LIBRARIES
    for line, name in imports(path):
        top, _, rest = name.partition(".")
        if top == "mambalm":
            target = rest.partition(".")[0]
            target = target if target in BELOW else ""
            if here and target not in BELOW[here] | {here}:
                yield f"{path.name}:{line}: {here} imports {name}, which is not below it"
        elif top not in sys.stdlib_module_names and outside is not None and top not in outside:
            yield f"{path.name}:{line}: {here} imports {name}; here only {', '.join(sorted(outside))} may be imported"
        elif top == "typer" and here != "cli":
            yield f"{path.name}:{line}: only cli imports typer"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    assert room(path) in BELOW or not room(path), f"{path} is in a room that this test does not know"
    assert not list(violations(path))


@pytest.mark.parametrize(
    ("where", "statement"),
    [
        ("ops/checks.py", "from mambalm.layers.state import State"),
        ("layers/mamba.py", "def f():\n    from mambalm import models"),
        ("data/packing.py", "import mambalm.training"),
        ("models/cache.py", "import mambalm"),
        ("generation/engine.py", "from mambalm.training import optimizer"),
        ("ops/ssd/reference.py", "import numba"),
        ("layers/mamba.py", "import transformers.utils"),
        ("training/loop.py", "import typer"),
    ],
)
def test_the_rules_catch(where: str, statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert len(list(violations(path))) == 1


def test_sizes() -> None:
    """Functions under 60 lines without their docstring, files up to 400, kernels excepted."""
    for path in MODULES:
        if path.stem.startswith("_numba_") or (room(path) == "ops" and path.stem not in SPECIFICATIONS):
            continue
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        assert not [f"{path}:{function.lineno} {function.name}" for function in functions if _size(function) >= 60]


def _size(function: ast.FunctionDef) -> int:
    first = function.body[0]
    documented = ast.get_docstring(function) is not None and first.end_lineno is not None
    docstring = first.end_lineno - first.lineno + 1 if documented and first.end_lineno else 0
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1 - docstring
