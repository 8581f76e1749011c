"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import typer

import mambalm

if TYPE_CHECKING:
    from mambalm.models.common import MambalmForCausalLM

DTYPES = ("float64", "float32", "bfloat16", "float16")

Dtype = Annotated[str | None, typer.Option(help=f"Parameters: {', '.join(DTYPES)}; by default as stored.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu, cuda or cuda:1; by default the GPU if there is one.")]
Quantization = Annotated[str | None, typer.Option(help="int8 or int4: the weights in so few bits, on a CPU.")]


def load_model(model: str, dtype: str | None, device: str | None, quantization: str | None) -> MambalmForCausalLM:
    """The checkpoint as the options ask for it; what is quantised goes to the CPU unless they say otherwise.

    Raises:
        ValueError: an option has a value that is not available.
    """
    place = "cpu" if device is None and quantization is not None else device
    return mambalm.load(model, dtype=parse_dtype(dtype), device=parse_device(place), quantization=quantization)


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of that name; None for None.

    Raises:
        ValueError: there is no floating dtype of that name.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def parse_device(name: str | None) -> torch.device:
    """The device of that name; for None the accelerator if there is one, else the CPU.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; choose cpu, cuda or cuda:1, for instance") from None
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise ValueError(f"this machine has no {device.type!r} device that torch can use; try --device cpu")
    return device
