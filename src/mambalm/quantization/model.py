"""What of a Mamba model is quantised, by module name.

in_proj and out_proj hold nine tenths of a layer and take 4 bits; x_proj steers Δ, B and C and the head chooses tokens,
so both keep 8. The step projection, convolution, A, D, norms and embeddings stay as they are: they are small or, the
embeddings, read one row at a time.
"""

from __future__ import annotations

from torch import nn

from mambalm.quantization.linear import QuantizedLinear
from mambalm.quantization.schemes import BITS

# The last part of a module's name, and the most bits that it is reduced to.
LEAST_BITS = {"in_proj": 4, "out_proj": 4, "fc1": 4, "fc2": 4, "x_proj": 8, "lm_head": 8}


def quantize_model(model: nn.Module, quantization: str) -> nn.Module:
    """Replace the Linears named above, in place, by ``QuantizedLinear``; returns the model.

    Args:
        model: on a CPU, with its weights loaded.
        quantization: "int8" or "int4".

    Raises:
        ValueError: the quantization has another name, the model is not on a CPU, or a weight cannot be quantised.
    """
    if quantization not in BITS:
        raise ValueError(
            f"quantization={quantization!r} is not available: choose {' or '.join(BITS)}, or None. For others use "
            "mambalm.register() and AutoModelForCausalLM.from_pretrained(..., quantization_config=...)"
        )
    for name, module in list(model.named_modules()):
        least = LEAST_BITS.get(name.rpartition(".")[2])
        if least is None or not isinstance(module, nn.Linear):
            continue
        if module.weight.device.type != "cpu":
            raise ValueError(
                f"quantization={quantization!r} is for a CPU, {name} is on {module.weight.device}: use device='cpu', "
                "or on a GPU AutoModelForCausalLM.from_pretrained(..., quantization_config=BitsAndBytesConfig(...))"
            )
        try:
            quantized = QuantizedLinear.of(module, max(BITS[quantization], least))
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantised: {error}") from error
        model.set_submodule(name, quantized)
    return model
