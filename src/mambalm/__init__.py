"""Mamba language models: every op, layer and model takes a state in and gives a state out.

Importing this package registers the `mambalm::` ops and does nothing else; transformers is imported by the first
call that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mambalm import ops
from mambalm.layers.state import State

if TYPE_CHECKING:
    import os

    import torch

    from mambalm.models.common import MambalmForCausalLM

__version__ = "0.1.0"
__all__ = ["State", "__version__", "load", "ops", "register"]


def load(
    path_or_hub_id: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    quantization: Any = None,
) -> MambalmForCausalLM:
    """Load a checkpoint of any known format and return the model in eval mode.

    Args:
        path_or_hub_id: a folder, a file or the name of a Hugging Face repository.
        dtype: the dtype of the parameters; None keeps the file's.
        device: where the parameters go.
        quantization: how to quantise, see `mambalm.models.loading`.

    Raises:
        ValueError: the format, a tensor or the vocabulary does not fit; the message names it and the remedy.
    """
    from mambalm.models import load as load_model

    return load_model(path_or_hub_id, dtype=dtype, device=device, quantization=quantization)


def register() -> None:
    """Make transformers' `AutoModelForCausalLM` return mambalm's classes for the families that it knows."""
    from mambalm.models import register as register_models

    register_models()
