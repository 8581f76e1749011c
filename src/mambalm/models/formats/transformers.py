"""transformers' format: `config.json` with a model_type, beside safetensors or torch files, in shards or not."""

from __future__ import annotations

from pathlib import Path

from transformers import FalconMambaConfig, Mamba2Config, MambaConfig, PreTrainedConfig

from mambalm.models.formats.checkpoint import Checkpoint, assemble, make_config, require_depth
from mambalm.models.formats.io import CheckpointError, Source, read_tensors, write_safetensors
from mambalm.models.hybrid_config import HybridConfig
from mambalm.models.writing import initialised

NAME = "transformers"
CONFIGS: dict[str, type[PreTrainedConfig]] = {
    config.model_type: config for config in (MambaConfig, FalconMambaConfig, Mamba2Config, HybridConfig)
}
# Without these transformers would take its defaults, whatever other names the configuration uses for them.
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")


def recognises(source: Source) -> bool:
    """Whether the folder holds this format."""
    return "model_type" in (source.json("config.json") or {}) and bool(_files(source))


def read(source: Source) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: the configuration is of another family, lacks a size, or is of a quantised model.
    """
    fields = source.json("config.json") or {}
    kind = fields["model_type"]
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise CheckpointError(f"config.json has model_type {kind!r}: mambalm builds {', '.join(CONFIGS)}")
    if missing := [key for key in SIZES if key not in fields]:
        raise CheckpointError(
            f"config.json has model_type {kind!r} but lacks {', '.join(missing)}, for which transformers would "
            "silently take its defaults: add them, or remove model_type if the other keys (d_model, n_layer) are "
            "mamba_ssm's"
        )
    if "quantization_config" in fields:
        raise CheckpointError(
            "config.json has a quantization_config: mambalm.load reads unquantised checkpoints; load this one with "
            "mambalm.register() and AutoModelForCausalLM.from_pretrained"
        )
    tensors = read_tensors(_files(source))
    require_depth(fields["num_hidden_layers"], tensors)
    # transformers spells infinite limits in its own way, and reads that back here.
    fields, _ = CONFIGS[kind].get_config_dict(source.folder)
    config = make_config(CONFIGS[kind], fields)
    return assemble(config, tensors, source)


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint as `save_pretrained` does, every tensor in its dtype."""
    with initialised(checkpoint.config):
        checkpoint.config.save_pretrained(folder)
    write_safetensors(folder, checkpoint.tensors)
    checkpoint.copy_companions(folder)


def _files(source: Source) -> list[Path]:
    return source.files("model", ".safetensors") or source.files("pytorch_model", ".bin")
