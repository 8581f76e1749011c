"""Mistral's layout of Codestral Mamba: `params.json` beside `consolidated*.safetensors`, within it mamba_ssm's Mamba-2.

Its fields are those of mistral-inference (`args.py`, MambaArgs), its model is `mamba.py` there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mambalm.models.formats import mamba_ssm
from mambalm.models.formats.checkpoint import Checkpoint, assemble, require_depth
from mambalm.models.formats.io import CheckpointError, Source, read_tensors

NAME = "mistral"
PREFIX = "model."
RENAMED = {"dim": "d_model", "n_layers": "n_layer"}
KEPT = ("vocab_size", "rms_norm", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings")
# The control tokens of Mistral's tokenizers; they have none for padding.
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def recognises(source: Source) -> bool:
    """Whether the folder holds this format."""
    return source.json("params.json") is not None and bool(_files(source))


def read(source: Source) -> Checkpoint:
    """Read a checkpoint as a Mamba2Config with its groups.

    Raises:
        CheckpointError: params.json is of a transformer, or has a field that is not known.
    """
    params, tensors = source.json("params.json") or {}, read_tensors(_files(source))
    require_depth(params.get("n_layers"), tensors)
    config = mamba_ssm.config_from(_as_mamba_ssm(params))
    mamba_ssm.set_token_ids(config, TOKEN_IDS)
    return assemble(config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, source)


def _files(source: Source) -> list[Path]:
    return source.files("consolidated", ".safetensors")


def _as_mamba_ssm(params: dict[str, Any]) -> dict[str, Any]:
    """params.json in mamba_ssm's terms."""
    if (kind := params.get("model_type", "mamba")) != "mamba":
        raise CheckpointError(f"params.json describes a {kind} model: only Mistral's Mamba models are built")
    known = {*RENAMED, *KEPT, "n_groups", "model_type"}
    if unknown := params.keys() - known:
        raise CheckpointError(f"params.json has {', '.join(sorted(unknown))}, which no Mamba model of Mistral's knows")
    raw: dict[str, Any] = {RENAMED.get(key, key): params[key] for key in (*RENAMED, *KEPT) if key in params}
    return raw | {"ssm_cfg": {"layer": "Mamba2", "ngroups": params.get("n_groups", 1)}}
