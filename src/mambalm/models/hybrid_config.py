"""The configuration of models that transformers has none for; it needs no model class, whose import takes a second."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mambalm.layers import Mamba, Mamba2

RECURRENT: dict[str, type[Mamba] | type[Mamba2]] = {"Mamba1": Mamba, "Mamba2": Mamba2}


# Of annotations that are strings, as a future import makes them, it would check none.
@strict
class HybridConfig(PreTrainedConfig):
    """What a hybrid is made of; the names of mamba_ssm's `MambaConfig` where transformers has none.

    Args:
        vocab_size: rows of the embeddings, padding included.
        hidden_size, num_hidden_layers: channels of the residual stream, number of blocks.
        d_intermediate: width of the gated MLP behind each mixer; 0: no MLP.
        ssm_cfg: arguments of the recurrent layers, and under "layer" which they are: "Mamba1" (default) or "Mamba2".
        attn_layer_idx: the blocks whose mixer is attention.
        attn_cfg: the arguments of those.
        rms_norm: RMSNorm; False: LayerNorm with biases.
        layer_norm_epsilon: eps of the norms over the residual stream.
        residual_in_fp32: keep the residual stream in float32 whatever the weights' dtype.
        pad_vocab_size_multiple: what the vocabulary was padded to; kept for mamba_ssm, which pads on loading.
        rescale_prenorm_residual: divide the initial weights that end a residual branch by the root of their number.

    Raises:
        StrictDataclassError: a field of another type.
        ValueError: an unknown layer, or an attention block outside the model.
    """

    model_type = "mambalm_hybrid"

    vocab_size: int = 50288
    hidden_size: int = 2560
    num_hidden_layers: int = 64
    d_intermediate: int = 0
    ssm_cfg: dict[str, Any] | None = None
    attn_layer_idx: list[int] | None = None
    attn_cfg: dict[str, Any] | None = None
    rms_norm: bool = True
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 8
    rescale_prenorm_residual: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.ssm_cfg = dict(self.ssm_cfg or {})
        self.attn_cfg = dict(self.attn_cfg or {})
        self.attn_layer_idx = sorted(self.attn_layer_idx or [])
        layer = self.ssm_cfg.get("layer", "Mamba1")
        if layer not in RECURRENT:
            raise ValueError(f"ssm_cfg['layer'] is {layer!r}: it must be one of {', '.join(RECURRENT)}")
        outside = [index for index in self.attn_layer_idx if not 0 <= index < self.num_hidden_layers]
        if outside:
            raise ValueError(
                f"attn_layer_idx names {outside}, the model's blocks are 0 to {self.num_hidden_layers - 1}"
            )
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """What each block's mixer is, in transformers' words."""
        attention = set(self.attn_layer_idx or ())
        indices = range(self.num_hidden_layers)
        return ["full_attention" if index in attention else "linear_attention" for index in indices]
