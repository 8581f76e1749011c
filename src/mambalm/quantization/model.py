"""What of a Mamba model is quantised, by module name.

in_proj and out_proj hold nine tenths of a layer and take 4 bits; x_proj steers Δ, B and C and the head chooses tokens,
so both keep 8. The step projection, convolution, A, D, norms and embeddings stay as they are: they are small or, the
embeddings, read one row at a time.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from mambalm.quantization.layout import BITS
from mambalm.quantization.linear import QuantizedLinear

# The last part of a module's name, and the most bits that it is reduced to.
LEAST_BITS = {"in_proj": 4, "out_proj": 4, "fc1": 4, "fc2": 4, "x_proj": 8, "lm_head": 8}


_Model = TypeVar("_Model", bound=nn.Module)


def require_available(quantization: str, device: torch.device | str) -> None:
    """Refuse what `quantize_model` cannot do.

    Raises:
        ValueError: the quantization has another name than "int8" or "int4", or the device is not a CPU.
    """
    elsewhere = "mambalm.register() and AutoModelForCausalLM.from_pretrained(..., quantization_config=...)"
    if quantization not in BITS:
        raise ValueError(
            f"quantization={quantization!r} is not available: choose {' or '.join(map(repr, BITS))}, or None; for "
            f"others use {elsewhere}"
        )
    if torch.device(device).type != "cpu":
        raise ValueError(
            f"quantization={quantization!r} is for a CPU, not for {device}: leave device out, or use {elsewhere}"
        )


def quantize_model(model: _Model, quantization: str) -> _Model:
    """Replace the Linears named above, in place, by `QuantizedLinear`; returns the model.

    Args:
        model: on a CPU, with its weights loaded.
        quantization: "int8" or "int4".

    Raises:
        ValueError: see `require_available`; or a weight cannot be quantised, which is named.
    """
    for name, module in list(model.named_modules()):
        least = LEAST_BITS.get(name.rpartition(".")[2])
        if least is None or not isinstance(module, nn.Linear):
            continue
        require_available(quantization, module.weight.device)
        try:
            quantized = QuantizedLinear.of(module, max(BITS[quantization], least))
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantised: {error}") from error
        model.set_submodule(name, quantized)
    return model
