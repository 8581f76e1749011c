"""One token per row of a model on a GPU, by the fused kernels of `mambalm.ops.triton_steps`.

What `model(tokens, cache_params=state)` computes, on a state that this step owns and that moves on in place. Mamba and
Mamba-2 layers and gated MLPs are kernels throughout; of attention layers what is between the projections is the
layer's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mambalm.layers.attention import Attention
from mambalm.layers.hooks import hooked
from mambalm.layers.mamba import PLAIN_PROJECTIONS, Mamba, full_precision
from mambalm.layers.mamba2 import Mamba2
from mambalm.layers.mlp import GatedMLP
from mambalm.layers.norm import RMSNorm
from mambalm.ops import backends

if TYPE_CHECKING:
    from mambalm.generation.owned_state import OwnedState
    from mambalm.models.common import MambalmForCausalLM
    from mambalm.ops.triton_mamba_steps import Mamba2Weights, MambaWeights
    from mambalm.ops.triton_steps import MLPWeights, Stream


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """An attention layer and the norm before it."""

    norm: RMSNorm
    mixer: Attention

    @property
    def widths(self) -> set[int]:
        """Of the projections."""
        return {self.mixer.in_proj.in_features, self.mixer.out_proj.in_features}


if TYPE_CHECKING:
    Weights = MambaWeights | Mamba2Weights | MLPWeights | AttentionLayer


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
    mixer, mlp = block.mixer, block.mlp
    kind = type(mixer)
    if kind not in (Mamba, Mamba2, Attention) or type(mlp) not in (GatedMLP, type(None)):
        return f"a layer is none that has kernels: {kind.__name__}, {type(mlp).__name__}"
    if any(type(norm) is not RMSNorm for norm in (block.norm, block.norm2) if norm is not None):
        return "a norm is no RMSNorm"
    if kind is Mamba2 and mixer.d_ssm != mixer.d_inner:
        return "a Mamba-2 layer has an MLP inside"
    projections = [mixer.in_proj, mixer.out_proj, *((mixer.x_proj, mixer.dt_proj) if kind is Mamba else ())]
    projections += [] if mlp is None else [mlp.fc1, mlp.fc2]
    if any(type(module) not in PLAIN_PROJECTIONS for module in projections):
        return "a projection is adapted or quantised"
    others = (block, mixer, mixer.conv1d, block.norm, block.norm2, mlp, getattr(mixer, "norm", None))
    if any(hooked(module) for module in (*others, *projections) if module is not None):
        return "a module has hooks"
    if getattr(mixer, "backend", None) not in (None, "triton"):
        return "a layer asks for another backend"
    weights = [module.weight for module in projections]
    if any(w.device != device or w.dtype != dtype or not w.is_contiguous() for w in weights):
        return "the projections differ in dtype or device, or are not contiguous"
    return None


def weights(block: Any) -> tuple[Weights, ...]:
    """A block's parameters as the kernels take them, a part for the mixer and one for the MLP if there is one."""
    from mambalm.ops.triton_steps import MLPWeights

    mixer, mlp = block.mixer, block.mlp
    if isinstance(mixer, Attention):
        first: Weights = AttentionLayer(block.norm, mixer)
    else:
        first = _mamba(block, mixer) if isinstance(mixer, Mamba) else _mamba2(block, mixer)
    if mlp is None:
        return (first,)
    norm, fc1, fc2 = block.norm2, mlp.fc1, mlp.fc2
    return first, MLPWeights(norm.weight, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


def version(block: Any) -> tuple[object, ...]:
    """What changes when a parameter is changed in place that `weights` computes something from."""
    parameters = (getattr(block.mixer, name, None) for name in ("A_log", "D", "dt_bias"))
    # Those of inference mode are not counted: they may always have changed.
    return tuple(object() if p.is_inference() else p._version for p in parameters if isinstance(p, Tensor))


def renew(block: Any, parts: tuple[Weights, ...]) -> None:
    """Compute again, where it is, what `weights` computed from the block's parameters."""
    for part, now in zip(parts, weights(block), strict=True):
        for name, value in vars(now).items():
            if isinstance(value, Tensor) and value.data_ptr() != (own := getattr(part, name)).data_ptr():
                own.copy_(value)


def _common(block: Any) -> dict[str, Any]:
    mixer = block.mixer
    return {
        "norm": block.norm.weight,
        "eps": block.norm.eps,
        "in_proj": mixer.in_proj.weight,
        "in_bias": mixer.in_proj.bias,
        "conv": mixer.conv1d.weight.squeeze(1),
        "conv_bias": mixer.conv1d.bias,
        "out_proj": mixer.out_proj.weight,
        "out_bias": mixer.out_proj.bias,
        "rates": (-full_precision(mixer.A_log.detach()).exp() * math.log2(math.e)).contiguous(),
    }


def _mamba(block: Any, mixer: Mamba) -> MambaWeights:
    from mambalm.ops.triton_mamba_steps import MambaWeights

    return MambaWeights(
        **_common(block),
        x_proj=mixer.x_proj.weight,
        dt_proj=mixer.dt_proj.weight,
        dt_bias=mixer.dt_proj.bias,
        D=mixer.D,
        inner_eps=mixer.bcdt_rms_eps,
    )


def _mamba2(block: Any, mixer: Mamba2) -> Mamba2Weights:
    from mambalm.ops.triton_mamba_steps import Mamba2Weights

    D = full_precision(mixer.D.detach())
    return Mamba2Weights(
        **_common(block),
        dt_bias=full_precision(mixer.dt_bias.detach()),
        D=D if mixer.D_has_hdim else D.repeat_interleave(mixer.headdim),
        groups=mixer.ngroups,
        states=mixer.d_state,
        dt_limit=mixer.dt_limit,
        gate_norm=None if mixer.norm is None else mixer.norm.weight,
        gate_eps=0.0 if mixer.norm is None else mixer.norm.eps,
    )


class FusedStep:
    """Reads a token per row.

    Args:
        model: `refusal(model)` is None. Its weights are read where they are: they must not be replaced meanwhile.
        owned: what all rows have read, for this step; it moves on.
        blocks: `weights` of the model's blocks.
    """

    def __init__(self, model: MambalmForCausalLM, owned: OwnedState, blocks: list[tuple[Weights, ...]]) -> None:
        from mambalm.ops.triton_steps import Stream

        self._embeddings = model.get_input_embeddings()
        self._head = model.lm_head
        self._norm: Any = model.backbone.norm_f
        self._position = owned.state.position
        first: Any = model.backbone.layers[0]
        stream = torch.promote_types(model.dtype, torch.float32) if first.residual_in_fp32 else model.dtype
        widths = {model.config.hidden_size}.union(*(part.widths for parts in blocks for part in parts))
        self._stream = Stream(
            owned.state.batch_size, model.config.hidden_size, model.dtype, stream, model.device, widths
        )
        self._parts = list(_parts(self._stream, owned, blocks))

    def __call__(self, tokens: Tensor, logits: Tensor) -> None:
        """Read tokens (b), write the logits (b, v) float32 after them."""
        stream, norm, head = self._stream, self._norm, self._head
        stream.x.copy_(self._embeddings(tokens))
        for part in self._parts:
            part()
        stream.head(norm.weight, norm.eps, head.weight, head.bias, logits)
        self._position.add_(1)


def _parts(stream: Stream, owned: OwnedState, blocks: list[tuple[Weights, ...]]) -> Iterator[Callable[[], None]]:
    """What takes the stream through the model; parts of the same sizes share the memory between their kernels."""
    from mambalm.ops.triton_mamba_steps import Mamba2Step, Mamba2Weights, MambaStep, MambaWeights
    from mambalm.ops.triton_steps import MLPStep, MLPWeights

    kinds: dict[type, Any] = {MambaWeights: MambaStep, Mamba2Weights: Mamba2Step, MLPWeights: MLPStep}
    memory: dict[Any, Any] = {}
    layers: Any = owned.state.layers
    for parts, layer in zip(blocks, layers, strict=True):
        for part in parts:
            if isinstance(part, AttentionLayer):
                yield functools.partial(_attend, stream, part, layer, stream.empty(part.mixer.in_proj.out_features))
                continue
            kind = type(part)
            key = kind, *(tuple(value.shape) for value in vars(part).values() if isinstance(value, Tensor))
            if key not in memory:
                memory[key] = kinds[kind](stream, part)
            state: Any = () if kind is MLPWeights else (layer.conv, layer.ssm)
            yield functools.partial(memory[key], part, *state)


def _attend(stream: Stream, part: AttentionLayer, layer: Any, inner: Tensor) -> None:
    """Take the stream through an attention layer, whose state moves on; inner (b, r) is memory."""
    mixer = part.mixer
    stream.enter(part.norm.weight, part.norm.eps, mixer.in_proj.weight, mixer.in_proj.bias, inner)
    y, after = mixer.mix(inner[:, None], layer)
    layer.lengths.copy_(after.lengths)
    if after.conv is not None:
        layer.conv.copy_(after.conv)
    stream.leave(y[:, 0], mixer.out_proj.weight, mixer.out_proj.bias)
