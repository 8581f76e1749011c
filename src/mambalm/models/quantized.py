"""What quantisers of transformers (bitsandbytes, torchao) leave alone in a Mamba model, unless they are told.

The step projection steers an exponential and x_proj feeds it; both are small, so quantising them saves little and costs
much. The convolution, the embeddings and the head stay in the checkpoint's dtype too.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from mambalm.layers.linear import Linear
from mambalm.layers.mamba import Mamba, StepProjection
from mambalm.quantization.linear import QuantizedLinear

DEFAULT_SKIPS = ("conv1d", "dt_proj", "embeddings", "lm_head", "x_proj")
# How the quantisation configs of transformers call the list of modules to leave alone.
_SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")


def with_default_skips(quantization_config: Any) -> Any:
    """A copy of a quantisation config that leaves `DEFAULT_SKIPS` alone; itself if it names what to skip."""
    for name in _SKIP_LISTS:
        if getattr(quantization_config, name, ()) is None:
            quantization_config = copy.deepcopy(quantization_config)
            setattr(quantization_config, name, list(DEFAULT_SKIPS))
    return quantization_config


def require_intact_weights(model: nn.Module) -> None:
    """Refuse to save weights that no checkpoint format has room for, or that would be written wrong.

    Those are the packed ones of `mambalm.load(quantization=...)`, and 4-bit weights that bitsandbytes 0.50 has
    rearranged for the CPU: its way back is wrong.

    Raises:
        ValueError: the model holds such a weight; the message names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            raise ValueError(
                f"{name} is packed in {module.bits} bits, which no checkpoint format has room for: save the model as "
                "it was loaded without quantization, and quantise when loading it"
            )
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} has run on the CPU, and bitsandbytes cannot write its 4-bit weights unharmed any more: "
                "load the checkpoint again and save it before the first forward pass"
            )


def plain_projections(model: nn.Module) -> None:
    """Make a model's projections ``nn.Linear`` itself if its config has a quantisation: quantisers replace only those.

    dt_proj only if the quantisation covers it, so that checkpoints which stock transformers quantised whole load.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
    values = config if isinstance(config, dict) else vars(config)
    skipped = [name for key in _SKIP_LISTS for name in values.get(key) or ()]
    if any("dt_proj" in name for name in skipped):
        return
    for module in model.modules():
        if isinstance(module, Mamba) and isinstance(module.dt_proj, StepProjection):
            old = module.dt_proj.weight
            rank, channels = module.dt_rank, module.d_inner
            module.set_submodule("dt_proj", nn.Linear(rank, channels, device=old.device, dtype=old.dtype))
