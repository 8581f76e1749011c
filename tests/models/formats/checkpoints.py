"""Tiny random checkpoints of every layout, as the packages that define them would write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Mamba2Config, MambaConfig, PreTrainedConfig, PreTrainedModel

from mambalm.models import HybridConfig, Mamba2ForCausalLM, MambaForCausalLM, MambaHybridForCausalLM

ATTENTION = {"causal": True, "num_heads": 2, "head_dim": 16, "rotary_emb_dim": 8}
ATTENTION |= {"qkv_proj_bias": False, "out_proj_bias": False}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 48}
RAW = {
    "d_model": 32,
    "n_layer": 3,
    "vocab_size": 45,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
}
TOKENS = torch.tensor([[1, 7, 44, 3, 0, 12, 9], [5, 5, 2, 40, 41, 8, 30]])


@dataclass(frozen=True)
class Layout:
    """mamba_ssm's configuration of a checkpoint, and the model that should come of it, written down independently."""

    raw: dict[str, Any]
    family: Callable[[PreTrainedConfig], PreTrainedModel]
    config: Callable[[], PreTrainedConfig]

    def model(self) -> PreTrainedModel:
        """A random model of the layout, in eval mode."""
        model = self.family(self.config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return model


LAYOUTS = {
    "mamba": Layout(
        RAW | {"ssm_cfg": {}, "pad_vocab_size_multiple": 8},
        MambaForCausalLM,
        lambda: MambaConfig(**SIZES),
    ),
    "mamba2": Layout(
        RAW
        | {"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 8, "ngroups": 2}, "pad_vocab_size_multiple": 16}
        | {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "tie_embeddings": False},
        Mamba2ForCausalLM,
        lambda: Mamba2Config(**SIZES, head_dim=16, num_heads=4, state_size=8, n_groups=2, tie_word_embeddings=False),
    ),
    "mamba2attn": Layout(
        RAW
        | {"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [1], "attn_cfg": ATTENTION | {"d_conv": 4}}
        | {"d_intermediate": 0, "pad_vocab_size_multiple": 16, "tie_embeddings": True},
        MambaHybridForCausalLM,
        lambda: HybridConfig(
            **SIZES,
            ssm_cfg={"layer": "Mamba2", "d_state": 128},
            attn_layer_idx=[1],
            attn_cfg=ATTENTION | {"d_conv": 4},
        ),
    ),
    "transformerpp": Layout(
        RAW
        | {"ssm_cfg": {}, "attn_layer_idx": [0, 1, 2], "attn_cfg": ATTENTION | {"num_heads_kv": 1}}
        | {"d_intermediate": 128, "pad_vocab_size_multiple": 16, "tie_embeddings": True},
        MambaHybridForCausalLM,
        lambda: HybridConfig(
            **SIZES,
            d_intermediate=128,
            attn_layer_idx=[0, 1, 2],
            attn_cfg=ATTENTION | {"num_heads_kv": 1},
        ),
    ),
}


def original_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors under mamba_ssm's names; a tied head is there twice, as in mamba_ssm's files."""
    names = {"backbone.embeddings.weight": "backbone.embedding.weight"}
    return {names.get(name, name): tensor.detach() for name, tensor in model.state_dict().items()}


def write_original(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor], kind: str = "bin") -> Path:
    """A folder as mamba_ssm's `save_pretrained` writes it ("bin"), or with safetensors, in one file or in shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "safetensors":
        save_file(own(tensors), folder / "model.safetensors")
    else:
        names = list(tensors)
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in shards.items():
            save_file(own({name: tensors[name] for name in part}), folder / file)
        weight_map = {name: file for file, part in shards.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, which safetensors asks for."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def logits(model: PreTrainedModel) -> Tensor:
    """What a model says to two rows of tokens (2, 7, v)."""
    with torch.no_grad():
        return model(TOKENS).logits
