"""The shapes of published models, to be built with random weights: by name, a transformers configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from mambalm.models.hybrid_config import HybridConfig
from mambalm.models.registration import LANGUAGE_MODELS

# Width and depth (Gu and Dao 2023, table 12; Dao and Gu 2024, table 9): GPT-3's, with two blocks per layer.
_WIDTH_DEPTH = {
    "130m": (768, 24),
    "370m": (1024, 48),
    "790m": (1536, 48),
    "1.4b": (2048, 48),
    "2.8b": (2560, 64),
}
_VOCABULARY = {"mamba": 50280, "mamba2": 50288}


def _shapes() -> dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]]:
    found: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {}
    for size, (width, depth) in _WIDTH_DEPTH.items():
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "tie_word_embeddings": True}
        found[f"mamba-{size}"] = (MambaConfig, {"vocab_size": _VOCABULARY["mamba"], **sizes})
        name = "mamba2-" + {"790m": "780m", "1.4b": "1.3b", "2.8b": "2.7b"}.get(size, size)
        heads = {"num_heads": 2 * width // 64, "head_dim": 64, "n_groups": 1, "state_size": 128}
        found[name] = (Mamba2Config, {"vocab_size": _VOCABULARY["mamba2"], **heads, **sizes})
    wide = {"hidden_size": 4096, "num_hidden_layers": 64, "tie_word_embeddings": False}
    found["mamba-7b-rw"] = (MambaConfig, {"vocab_size": 50432, **wide})
    # arXiv:2405.21060, section 9.2.3.
    attention: dict[str, Any] = {"num_heads": 30, "head_dim": 128, "rotary_emb_dim": 64, "d_conv": 4}
    attention |= {"qkv_proj_bias": False, "out_proj_bias": False}
    hybrid: dict[str, Any] = {"attn_layer_idx": [9, 18, 27, 37, 46, 55], "attn_cfg": attention}
    hybrid |= {"ssm_cfg": {"layer": "Mamba2", "d_state": 128, "headdim": 64}, "vocab_size": _VOCABULARY["mamba2"]}
    found["mamba2attn-2.7b"] = (HybridConfig, {**hybrid, "hidden_size": 2560, "num_hidden_layers": 64})
    found["falcon-mamba-7b"] = (FalconMambaConfig, {"vocab_size": 65024, "intermediate_size": 8192, **wide})
    return found


SHAPES = _shapes()


def shape(name: str) -> PreTrainedConfig:
    """The configuration of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}; choose one of {', '.join(SHAPES)}")
    kind, sizes = SHAPES[name]
    return kind(**sizes)


def similar_transformer(config: PreTrainedConfig, parameters: int) -> LlamaConfig:
    """A Transformer of the same width and vocabulary, with the number of layers that comes nearest in parameters.

    Four query heads share keys and values, and the MLP is 3.5 times as wide, as in Mistral 7B and Llama 3 8B.
    """
    width = config.hidden_size
    head = min(128, width)
    heads = width // head
    shared = next(count for count in (4, 3, 2, 1) if heads % count == 0)
    tied = bool(config.tie_word_embeddings)
    inner = 7 * width // 2
    layer = 2 * width * head * (heads + heads // shared) + 3 * width * inner + 2 * width
    embeddings = (1 if tied else 2) * config.vocab_size * width
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=max(1, round((parameters - embeddings) / layer)),
        num_attention_heads=heads,
        num_key_value_heads=heads // shared,
        head_dim=head,
        max_position_embeddings=2**20,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )


def random_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str, *, transformers: bool = False
) -> PreTrainedModel:
    """A model with random weights, in eval mode, made on the device and in the dtype: nothing larger ever exists.

    mambalm's class if it has one for the configuration and `transformers` does not ask for that library's own.
    """
    families: dict[type, Any] = {family.config_class: family for family in LANGUAGE_MODELS}
    family = None if transformers else families.get(type(config))
    with torch.device(device):
        if family is None:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = family._from_config(config, dtype=dtype)
    return model.eval()
