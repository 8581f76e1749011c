"""A tiny random model of each family, with the odd values that real checkpoints have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from mambalm.models.common import MambalmForCausalLM

VOCABULARY = 64


def tiny_models(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, MambalmForCausalLM]:
    """The models in eval mode, by the name of the family: Mamba, FalconMamba, Mamba-2, hybrid and Transformer++."""
    from transformers import FalconMambaConfig, Mamba2Config, MambaConfig

    from mambalm import models

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    attention: dict[str, Any] = {"num_heads": 4, "num_heads_kv": 2, "head_dim": 8, "rotary_emb_dim": 4, "d_conv": 4}
    # falcon-mamba-7b says `expand` 16 as well, and its `intermediate_size` counts; Codestral Mamba has 8 groups.
    odd: dict[str, Any] = {"expand": 16, "intermediate_size": 64}
    falcon = FalconMambaConfig(**common, **odd, state_size=8)
    mamba2 = Mamba2Config(**common, num_heads=8, head_dim=8, n_groups=4, state_size=16, chunk_size=32)
    ssm = {"layer": "Mamba2", "d_state": 16, "headdim": 8}
    hybrid = models.HybridConfig(**common, ssm_cfg=ssm, attn_layer_idx=[1], attn_cfg=attention)
    transformer = models.HybridConfig(**common, d_intermediate=64, attn_layer_idx=[0, 1], attn_cfg=attention)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        built: dict[str, MambalmForCausalLM] = {
            "Mamba": models.MambaForCausalLM(MambaConfig(**common, state_size=8)),
            "FalconMamba": models.FalconMambaForCausalLM(falcon),
            "Mamba-2": models.Mamba2ForCausalLM(mamba2),
            "Mamba-2 with attention": models.MambaHybridForCausalLM(hybrid),
            "Transformer++": models.MambaHybridForCausalLM(transformer),
        }
    for model in built.values():
        nn.Module.to(model, dtype).eval()
    return built
