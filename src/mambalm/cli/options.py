"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

import mambalm

if TYPE_CHECKING:
    from mambalm.generation import PrefixStore
    from mambalm.models.common import MambalmForCausalLM

# What a shell expects of a process that Ctrl-C ended.
INTERRUPTED = 130
DTYPES = ("float64", "float32", "bfloat16", "float16")

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint's folder, or the name of a Hugging Face repository.")
]
Tokenizer = Annotated[str | None, typer.Option(help="A tokenizer's folder or name; by default MODEL's.")]
Dtype = Annotated[str | None, typer.Option(help=f"Parameters: {', '.join(DTYPES)}; by default as stored.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu, cuda or cuda:1; by default the GPU if there is one.")]
Adapter = Annotated[str | None, typer.Option(help="A LoRA as PEFT and `mambalm train` write it, added to the weights.")]
Quantization = Annotated[str | None, typer.Option(help="int8 or int4: the weights in so few bits, on a CPU.")]
ConvertState = Annotated[bool, typer.Option("--convert-state", help="Accept a state of another device or dtype.")]
StoreFolder = Annotated[
    Path | None,
    typer.Option("--prefix-store", help="Keep states in this folder, and read on from what it has of a prompt."),
]
StoreGib = Annotated[float, typer.Option(help="Bound of that folder in GiB; what was used longest ago goes first.")]

Temperature = Annotated[float, typer.Option(help="Divides the logits; 0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that sum to p.")]
MinP = Annotated[float, typer.Option(help="Keep tokens at least p times as probable as the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1, tokens come less often again.")]
PresencePenalty = Annotated[float, typer.Option(help="Subtracted from the logits of tokens written.")]
FrequencyPenalty = Annotated[float, typer.Option(help="The same, once for each time.")]


def load_model(
    model: str, dtype: str | None, device: str | None, quantization: str | None, adapter: str | None = None
) -> MambalmForCausalLM:
    """The checkpoint as the options ask for it; what is quantised goes to the CPU unless they say otherwise.

    Raises:
        ValueError: an option has a value that is not available.
        FileNotFoundError: there is no such adapter.
    """
    place = parse_device("cpu" if device is None and quantization is not None else device)
    if adapter is None:
        return mambalm.load(model, dtype=parse_dtype(dtype), device=place, quantization=quantization)
    from mambalm.models import merge_adapter
    from mambalm.quantization.model import quantize_model, require_available

    if quantization is not None:
        require_available(quantization, place)
    network = merge_adapter(mambalm.load(model, dtype=parse_dtype(dtype), device=place), adapter)
    return network if quantization is None else quantize_model(network, quantization)


def require_writable(file: Path) -> None:
    """Raise before anything is computed where a file could not be written.

    Raises:
        ValueError: it is a folder, or in none.
    """
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"{file} cannot be written: name a file in a folder that exists")


def require_state(file: Path) -> None:
    """Raise where a state file is not there.

    Raises:
        ValueError: so it is.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no state file: name one that `mambalm read` or /save of `mambalm chat` wrote")


def open_store(folder: Path | None, gib: float) -> PrefixStore | None:
    """The prefix store of the options, which is made where it is not; None without one.

    Raises:
        ValueError: the name is a file's, or the bound is not positive.
    """
    if folder is None:
        return None
    from mambalm.generation import PrefixStore

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder for the prefix store")
    return PrefixStore(folder, int(gib * 2**30))


def told(store: PrefixStore) -> str:
    """What a store did."""
    counts = store.counts
    known = f"{counts.found:,} of {counts.asked:,} tokens were known, in {counts.hits} of {counts.lookups} prompts"
    damaged = f", {counts.damaged} were damaged" if counts.damaged else ""
    too_large = f", {counts.too_large} were larger than the bound" if counts.too_large else ""
    return f"prefix store: {known}; {counts.stored} states added, {counts.evicted} removed{damaged}{too_large}"


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of that name; None for None.

    Raises:
        ValueError: there is no floating dtype of that name.
    """
    if name is None:
        return None
    if name not in DTYPES:
        hint = "; int8 and int4 weights are of --quantization" if name in ("int8", "int4") else ""
        raise ValueError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}{hint}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def parse_device(name: str | None) -> torch.device:
    """The device of that name; for None the accelerator if there is one, else the CPU.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    from mambalm.models.loading import default_device

    best = default_device()
    if name is None:
        return best
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; choose cpu, cuda or cuda:1, for instance") from None
    if device.type not in ("cpu", best.type):
        raise ValueError(f"this machine has no {device.type!r} device that torch can use; try --device cpu")
    return device
