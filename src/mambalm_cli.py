"""The `mambalm` command: the list of its sub-commands, each imported when called.

It stands beside the package because importing `mambalm` imports torch, for which `--help` and shell completion need
not wait. A sub-command is the function of its file's name in `mambalm/cli/`.
"""

from __future__ import annotations

import atexit
import gc
import re
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import requires, version
from typing import Annotated

import typer
from typer.main import get_command

COMMANDS = {
    "benchmark": "Measure speed and memory of whole models, beside a Transformer of the same size.",
    "chat": "Talk with a model; conversations can be undone, saved and loaded.",
    "convert": "Rewrite a checkpoint in another format, without loss.",
    "doctor": "Print versions, devices and which backend each op would run on.",
    "evaluate": "Score a model on tasks of the lm-evaluation-harness.",
    "export": "Write a training run's checkpoint as a model in transformers' format.",
    "generate": "Continue a prompt.",
    "quickstart": "Train a small Mamba on this Python's standard library, then let it write.",
    "read": "Read a text of any length, and keep the state.",
    "tokenize": "Turn text into token files to train on.",
    "train": "Train a model by a recipe, from one core to a cluster.",
    "verify": "Check that a model gives the same result however its tokens are fed.",
}
# What a user can mend: it is told in one line. Anything else is a bug of ours, and keeps its traceback.
MENDABLE = (ValueError, TypeError, OSError, ImportError, RuntimeError)

_FAULTS = {
    FileNotFoundError: "does not exist: check the name",
    IsADirectoryError: "is a folder: name a file",
    NotADirectoryError: "is not in a folder, or is none: name a folder",
    FileExistsError: "is there already, and is no folder: name another",
    PermissionError: "may not be read or written: check its permissions",
}

app = typer.Typer(name="mambalm", no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("mambalm"))
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, generate with and examine Mamba language models."""
    ctx.obj = debug


def _message(error: Exception) -> str:
    """What went wrong; for a file what about it, for a package of an extra that is not installed how to get it."""
    if isinstance(error, OSError) and error.filename is not None:
        what = next((words for kind, words in _FAULTS.items() if isinstance(error, kind)), f"fails ({error.strerror})")
        return f"{error.filename} {what}"
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0].replace("_", "-")
        for line in requires("mambalm") or []:
            found = re.fullmatch(rf"{re.escape(package)}\b.*; extra == [\"'](\w+)[\"']", line, re.IGNORECASE)
            if found:
                return f"{package} is not installed: pip install 'mambalm[{found[1]}]'"
    return str(error)


def _forward(name: str) -> Callable[[typer.Context], None]:
    """A command that imports the real one and hands its arguments on."""

    def run(ctx: typer.Context) -> None:
        try:
            import_module("mambalm.models.quiet").quieten()
            real = getattr(import_module(f"mambalm.cli.{name}"), name)
            if not isinstance(real, typer.Typer):
                command, real = real, typer.Typer(add_completion=False)
                real.command()(command)
            get_command(real).main(args=ctx.args, prog_name=f"mambalm {name}")
        except MENDABLE as error:
            if ctx.obj:
                raise
            typer.secho(f"mambalm {name}: {_message(error)}", fg="red", err=True)
            raise typer.Exit(2) from None

    return run


for _name, _help in COMMANDS.items():
    app.command(
        _name,
        help=_help,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_forward(_name))


def _one_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    return f"{category.__name__}: {message}\n"


def _let_go() -> None:
    # Triton's bindings complain at length of what the collector has not seen.
    if "triton" not in sys.modules:
        gc.freeze()


def main() -> None:
    """Run the command line."""
    # What torch and transformers make when they are imported stays to the end. Looked through for garbage again and
    # again it takes a fifth of the start, and at the end nearly a second for nothing.
    gc.set_threshold(10_000)
    atexit.register(_let_go)
    # A user has no use for the line of source that warned.
    warnings.formatwarning = _one_line
    app()
