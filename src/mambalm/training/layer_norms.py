"""Root mean squares of Δ, B, C and the final state in every layer: what shows early that a state-space model drifts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambalm.layers import Mamba, Mamba2
from mambalm.layers.state import MambaState
from mambalm.models.common import MambalmForCausalLM


def _rms(tensor: Tensor) -> Tensor:
    return tensor.detach().float().square().mean().sqrt()


@torch.no_grad()
def layer_norms(model: MambalmForCausalLM, tokens: Tensor) -> dict[str, float]:
    """Read tokens (b, l) and measure every Mamba layer, as ``layers/3/delta`` and so on.

    Δ is taken after its softplus; B and C as the projection gives them, for Mamba-2 after the convolution.
    """
    found: dict[str, Tensor] = {}
    handles = []
    layers: Any = model.backbone.layers
    for index, block in enumerate(layers):
        hooks: dict[str, Any] = {}
        if isinstance(block.mixer, Mamba):
            hooks = {"x_proj": _b_and_c, "dt_proj": _delta}
        elif isinstance(block.mixer, Mamba2):
            hooks = {"conv1d": _b_and_c_of_heads, "in_proj": _delta_of_heads}
        for name, hook in hooks.items():
            module = getattr(block.mixer, name)
            handles.append(module.register_forward_hook(partial(hook, found, f"layers/{index}", block.mixer)))
    try:
        state = model(tokens, cache_params=model.init_state(tokens.shape[0]), logits_to_keep=1).cache_params
    finally:
        for handle in handles:
            handle.remove()
    for index, layer in enumerate(state.layers):
        if isinstance(layer, MambaState):
            found[f"layers/{index}/state"] = _rms(layer.ssm)
    if not found:
        return {}
    # One wait for the device instead of one for each number.
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def _b_and_c(found: dict[str, Tensor], where: str, mixer: Mamba, _: nn.Module, __: Any, output: Tensor) -> None:
    _, b, c = output.split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    found[f"{where}/B"], found[f"{where}/C"] = _rms(b), _rms(c)


def _delta(found: dict[str, Tensor], where: str, mixer: Mamba, module: nn.Module, _: Any, output: Tensor) -> None:
    bias = getattr(module, "scan_bias", None)
    delta = output.float() if bias is None else output.float() + bias.float()
    found[f"{where}/delta"] = _rms(F.softplus(delta))


def _b_and_c_of_heads(found: dict[str, Tensor], where: str, mixer: Mamba2, _: nn.Module, __: Any, output: Any) -> None:
    size = mixer.ngroups * mixer.d_state
    _, b, c = output[0].split([mixer.d_ssm, size, size], dim=-1)
    found[f"{where}/B"], found[f"{where}/C"] = _rms(b), _rms(c)


def _delta_of_heads(found: dict[str, Tensor], where: str, mixer: Mamba2, _: nn.Module, __: Any, output: Tensor) -> None:
    found[f"{where}/delta"] = _rms(F.softplus(output[..., -mixer.nheads :].float() + mixer.dt_bias.float()))
