"""OpenLM's checkpoints: a torch file with the weights under `state_dict`, and the model's JSON copied beside it.

OpenLM builds mamba_ssm's MambaLMHeadModel from d_model, n_layer and vocab_size alone (`open_lm/model.py`), so what the
JSON leaves out is what that constructor assumes: LayerNorm, no padding of the vocabulary, a residual in the weights'
dtype. Whether the norms are LayerNorms and whether the head is tied is read from the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambalm.models.formats import mamba_ssm
from mambalm.models.formats.checkpoint import HEAD, Checkpoint, assemble, require_depth
from mambalm.models.formats.io import CheckpointError, Source, parse_json, read_torch

NAME = "openlm"
SUFFIXES = (".pt", ".pth")
# The folder of the weights within a run's.
CHECKPOINTS = "checkpoints"
# OpenLM writes these beside the weights.
NOT_WEIGHTS = ("optimizer_", "stats_")
# torch.compile, DistributedDataParallel and OpenLM's own wrapper put these before mamba_ssm's names, in any order.
PREFIXES = ("_orig_mod.", "module.", "model.")
ASSUMED = {"residual_in_fp32": False, "fused_add_norm": False, "pad_vocab_size_multiple": 1}
BIAS = "backbone.norm_f.bias"
# The length it was trained at, which the model does not depend on.
WITHOUT_EFFECT = "seq_len"


def recognises(source: Source) -> bool:
    """Whether the path is a torch file, or a folder with one (or with OpenLM's folder `checkpoints`)."""
    return bool(_candidates(source))


def read(source: Source) -> Checkpoint:
    """Read a checkpoint: with LayerNorms as a HybridConfig, else as a MambaConfig.

    Raises:
        CheckpointError: there are several files of weights or none or several JSON files, or they do not fit together.
    """
    candidates = _candidates(source)
    if len(candidates) > 1:
        names = ", ".join(path.name for path in candidates)
        raise CheckpointError(f"{source.folder} holds several checkpoints ({names}): pass the path of one file")
    path = candidates[0]
    tensors = _weights(path)
    raw = {**ASSUMED, **_model_json(path)}
    raw.pop(WITHOUT_EFFECT, None)
    _settle_norm(raw, has_bias=BIAS in tensors)
    embeddings = tensors.get("backbone.embedding.weight")
    if "tie_embeddings" not in raw and embeddings is not None:
        head = tensors.get(HEAD, embeddings)
        raw["tie_embeddings"] = head.shape == embeddings.shape and torch.equal(head, embeddings)
    require_depth(raw["n_layer"], tensors)
    return assemble(mamba_ssm.config_from(raw), tensors, Source(path.parent))


def _candidates(source: Source) -> list[Path]:
    if source.weights is not None:
        return [source.weights] if source.weights.suffix in SUFFIXES else []
    for folder in (source.folder, source.folder / CHECKPOINTS):
        found = [p for suffix in SUFFIXES for p in folder.glob(f"*{suffix}") if not p.name.startswith(NOT_WEIGHTS)]
        if found:
            return sorted(found)
    return []


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors under mamba_ssm's names."""
    contents = read_torch(path)
    weights = contents.get("state_dict", contents)
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f"{path} has no state_dict of tensors (it holds {', '.join(contents)}): save one as OpenLM does"
        )
    return {_bare(name): tensor.detach() for name, tensor in weights.items()}


def _bare(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _model_json(path: Path) -> dict[str, Any]:
    """The model's JSON: in the folder of the weights, or in the one above, where OpenLM keeps the run's files."""
    above = [path.parent.parent] if path.parent.name == CHECKPOINTS else []
    for folder in [path.parent, *above]:
        contents = {file: parse_json(file) for file in sorted(folder.glob("*.json"))}
        models = {file: content for file, content in contents.items() if _is_model(content)}
        if len(models) > 1:
            names = ", ".join(file.name for file in models)
            raise CheckpointError(
                f"{folder} holds several model configurations ({names}): leave the one of {path.name}"
            )
        if models:
            return next(iter(models.values()))
    raise CheckpointError(
        f"{path} needs its model's JSON beside it, with {', '.join(mamba_ssm.REQUIRED)}: copy it from OpenLM's "
        "open_lm/model_configs, or from what --model named"
    )


def _is_model(content: Any) -> bool:
    return isinstance(content, dict) and content.keys() >= set(mamba_ssm.REQUIRED)


def _settle_norm(raw: dict[str, Any], *, has_bias: bool) -> None:
    """Set rms_norm by the weights: LayerNorm has a bias, RMSNorm none."""
    if raw.setdefault("rms_norm", not has_bias) == has_bias:
        stated, tensor = str(raw["rms_norm"]).lower(), "has" if has_bias else "lacks"
        raise CheckpointError(f"the JSON says rms_norm: {stated}, and the checkpoint {tensor} {BIAS}: correct the JSON")
