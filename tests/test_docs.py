"""What the documents show runs as it stands: their Python, and their commands as far as to the options."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(document.read_text(encoding="utf-8")) if kind == language]


def commands() -> list[str]:
    """Every command line of mambalm in the documents, once."""
    lines = [line for path in DOCUMENTS for block in blocks(path, "") for line in block.splitlines()]
    found = (re.search(r"\bmambalm (?!COMMAND).*", line) for line in lines)
    return sorted({match[0].strip() for match in found if match})


@pytest.mark.parametrize("name", ["generation.md", "sessions.md"])
def test_python_runs(name: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "quickstart" / "model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in blocks(ROOT / "docs" / name, "python"):
        exec(compile(code, name, "exec"), names)


def test_commands_are_found() -> None:
    assert {line.split()[1] for line in commands()} >= {"benchmark", "chat", "generate", "read", "train", "verify"}


@pytest.mark.parametrize("line", commands())
def test_commands_have_the_options_that_the_documents_give_them(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    real = getattr(import_module(f"mambalm.cli.{name}"), name)
    if not isinstance(real, typer.Typer):
        command, real = real, typer.Typer(add_completion=False)
        real.command()(command)
    parsed: Any = get_command(real)
    if hasattr(parsed, "commands"):
        parsed = parsed.commands[arguments.pop(0)]
    parsed.make_context(line, arguments)
