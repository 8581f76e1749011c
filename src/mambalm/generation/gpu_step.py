"""One token per row of a Mamba or FalconMamba model on a GPU, by the fused kernels of `mambalm.ops.triton_steps`.

What `model(tokens, cache_params=state)` computes, on a state that this step owns and that moves on in place.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mambalm.generation.cpu_step import hooked
from mambalm.layers.mamba import PLAIN_PROJECTIONS, Mamba, full_precision
from mambalm.layers.norm import RMSNorm
from mambalm.ops import backends

if TYPE_CHECKING:
    from mambalm.layers.state import State
    from mambalm.models.common import MambalmForCausalLM
    from mambalm.ops.triton_steps import Weights

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(model: MambalmForCausalLM) -> str | None:
    """Why a model has no such step; None if it has."""
    device = model.device
    if backends.requested(None) not in ("", "triton"):
        return "another backend is asked for"
    if (reason := _triton(device, model.dtype)) is not None:
        return reason
    if type(model.backbone.norm_f) is not RMSNorm or any(map(hooked, (model, model.backbone, model.backbone.norm_f))):
        return "a module has hooks, or the final norm is no RMSNorm"
    if type(model.lm_head) is not nn.Linear or hooked(model.lm_head):
        return "the head is adapted or quantised"
    blocks: Any = model.backbone.layers
    return next((reason for block in blocks if (reason := _block_refusal(block, device, model.dtype))), None)


def _triton(device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        from mambalm.ops.triton_support import unsupported
    except ImportError as error:
        return f"Triton's import failed ({error})"
    return unsupported(backends.Call("selective_scan", device, dtype))


def _block_refusal(block: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    mixer = block.mixer
    if type(mixer) is not Mamba or block.mlp is not None or type(block.norm) is not RMSNorm:
        return f"a layer is more than a norm and a Mamba layer: {type(mixer).__name__}"
    projections = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    if any(type(module) not in PLAIN_PROJECTIONS for module in projections):
        return "a projection is adapted or quantised"
    if any(map(hooked, (block, mixer, mixer.conv1d, block.norm, *projections))):
        return "a module has hooks"
    if mixer.backend not in (None, "triton"):
        return "a layer asks for another backend"
    weights = [module.weight for module in projections]
    if any(w.device != device or w.dtype != dtype or not w.is_contiguous() for w in weights):
        return "the projections differ in dtype or device, or are not contiguous"
    return None


def weights(block: Any) -> Weights:
    """A block's parameters as the kernels take them: as they are, but for the decay rates."""
    from mambalm.ops.triton_steps import Weights

    mixer = block.mixer
    return Weights(
        norm=block.norm.weight,
        eps=block.norm.eps,
        in_proj=mixer.in_proj.weight,
        in_bias=mixer.in_proj.bias,
        conv=mixer.conv1d.weight.squeeze(1),
        conv_bias=mixer.conv1d.bias,
        x_proj=mixer.x_proj.weight,
        dt_proj=mixer.dt_proj.weight,
        dt_bias=mixer.dt_proj.bias,
        rates=(-full_precision(mixer.A_log.detach()).exp() * math.log2(math.e)).contiguous(),
        D=mixer.D,
        out_proj=mixer.out_proj.weight,
        out_bias=mixer.out_proj.bias,
        inner_eps=mixer.bcdt_rms_eps,
    )


class FusedStep:
    """Reads a token per row.

    Args:
        model: `refusal(model)` is None. Its weights are read where they are: they must not be replaced meanwhile.
        state: of all rows; this step owns it from now on.
        blocks: `weights` of the model's blocks.
    """

    def __init__(self, model: MambalmForCausalLM, state: State, blocks: list[Weights]) -> None:
        from mambalm.ops.triton_steps import Step

        self._embeddings = model.get_input_embeddings()
        self._head = model.lm_head
        self._norm: Any = model.backbone.norm_f
        self._blocks, self._state = blocks, state
        first: Any = model.backbone.layers[0]
        stream = torch.promote_types(model.dtype, torch.float32) if first.residual_in_fp32 else model.dtype
        self._step = Step(state.batch_size, blocks[0], stream)

    def __call__(self, tokens: Tensor, logits: Tensor) -> None:
        """Read tokens (b), write the logits (b, v) float32 after them."""
        step, norm, head = self._step, self._norm, self._head
        step.x.copy_(self._embeddings(tokens))
        layers: Any = self._state.layers
        for block, layer in zip(self._blocks, layers, strict=True):
            step.block(block, layer.conv, layer.ssm)
        step.head(norm.weight, norm.eps, head.weight, head.bias, logits)
        self._state.position.add_(1)
