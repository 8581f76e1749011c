"""Tiny random models of every family, beside transformers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig, PreTrainedConfig, PreTrainedModel

from mambalm.models.common import MambalmForCausalLM
from mambalm.models.falcon_mamba import FalconMambaForCausalLM
from mambalm.models.hybrid import HybridConfig, MambaHybridForCausalLM
from mambalm.models.mamba import MambaForCausalLM
from mambalm.models.mamba2 import Mamba2ForCausalLM

VOCABULARY = 48
# No token is special, so that generation goes on to the length that a test asks for.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ATTENTION: dict[str, Any] = {
    "causal": True,
    "num_heads": 4,
    "num_heads_kv": 2,
    "head_dim": 8,
    "rotary_emb_dim": 4,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
}


@dataclass(frozen=True)
class Family:
    """One of mambalm's classes, the class of transformers that it stands in for, and a tiny config."""

    ours: type[MambalmForCausalLM]
    stock: type[PreTrainedModel] | None
    config: Callable[..., PreTrainedConfig]

    def model(self, seed: int = 0, **changes: Any) -> MambalmForCausalLM:
        """A random model in eval mode, no parameter at a special value (zero biases, D = 1)."""
        torch.manual_seed(seed)
        model = self.ours(self.config(**changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return model

    def stock_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """transformers' own model with the same weights, in eval mode."""
        assert self.stock is not None
        stock = self.stock(copy.deepcopy(model.config)).eval()
        stock.load_state_dict(model.state_dict())
        return stock


def mamba(**changes: Any) -> MambaConfig:
    return MambaConfig(**SIZES | {"state_size": 4} | changes)


def falcon_mamba(**changes: Any) -> FalconMambaConfig:
    """As falcon-mamba-7b has it: `expand` says 16, `intermediate_size` something else and counts; untied."""
    odd = {"expand": 16, "intermediate_size": 40, "tie_word_embeddings": False}
    # Of one channel alone the norm of Δ leaves the sign, and its gradient is all rounding.
    odd |= {"state_size": 4, "time_step_rank": 4}
    return FalconMambaConfig(**SIZES | odd | changes)


def mamba2(**changes: Any) -> Mamba2Config:
    """As Codestral Mamba has it: eight groups, untied."""
    odd = {"hidden_size": 32, "state_size": 4, "num_heads": 16, "head_dim": 4, "n_groups": 8, "chunk_size": 8}
    return Mamba2Config(**SIZES | odd | changes)


def hybrid(**changes: Any) -> HybridConfig:
    """As mamba2attn-2.7b has it: Mamba-2 and attention with a convolution, and a gated MLP in each block."""
    parts = {
        "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 8},
        "attn_layer_idx": [1],
        "attn_cfg": ATTENTION | {"d_conv": 4},
        "d_intermediate": 24,
    }
    return HybridConfig(**SIZES | parts | changes)


def transformerpp(**changes: Any) -> HybridConfig:
    """As the Mamba papers' baseline has it: attention and a gated MLP in each block."""
    parts = {"attn_layer_idx": [0, 1], "attn_cfg": ATTENTION, "d_intermediate": 24}
    return HybridConfig(**SIZES | parts | changes)


STOCK = {
    "mamba": Family(MambaForCausalLM, transformers.MambaForCausalLM, mamba),
    "falcon_mamba": Family(FalconMambaForCausalLM, transformers.FalconMambaForCausalLM, falcon_mamba),
    "mamba2": Family(Mamba2ForCausalLM, transformers.Mamba2ForCausalLM, mamba2),
}
FAMILIES = STOCK | {"hybrid": Family(MambaHybridForCausalLM, None, hybrid)}

# What differs from the hybrid in its layers alone, for what treats layers by their kind.
WITH_TRANSFORMERPP = FAMILIES | {"transformerpp": Family(MambaHybridForCausalLM, None, transformerpp)}


def lively(family: str, **changes: Any) -> MambalmForCausalLM:
    """A model whose greedy text is not one token repeated."""
    model = WITH_TRANSFORMERPP[family].model(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.endswith("A_log"):
                parameter *= 4
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, ids: torch.Tensor, count: int = 6, **arguments: Any) -> torch.Tensor:
    """The generated tokens only."""
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=count, do_sample=False, **arguments)[:, ids.shape[1] :]
