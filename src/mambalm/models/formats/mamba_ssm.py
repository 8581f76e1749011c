"""Checkpoints of the package mamba_ssm: `config.json` with d_model and n_layer, beside a torch or safetensors file.

Names and defaults are those of state-spaces/mamba (`config_mamba.py`, `mixer_seq_simple.py`, `modules/`). Plain Mamba
and Mamba-2 become transformers' configurations; attention, MLPs, LayerNorm and options that transformers lacks make
mambalm's hybrid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import GenerationConfig, Mamba2Config, MambaConfig, PreTrainedConfig

from mambalm.layers import Mamba, Mamba2
from mambalm.models.formats.checkpoint import EMBEDDINGS, HEAD, Checkpoint, assemble, make_config, require_depth
from mambalm.models.formats.io import CheckpointError, Source, read_tensors, write_json, write_torch
from mambalm.models.hybrid_config import HybridConfig

NAME = "mamba_ssm"
EMBEDDING = "backbone.embedding.weight"
REQUIRED = ("d_model", "n_layer", "vocab_size")
DEFAULTS: dict[str, Any] = {
    "d_intermediate": 0,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Under this name a configuration keeps what it has no field for and what changes nothing that the weights compute.
RECORD = "mamba_ssm"
RECORDED = ("vocab_size", "pad_vocab_size_multiple", "fused_add_norm")


class Option(NamedTuple):
    """An entry of ssm_cfg: transformers' name for it, and the value that mamba_ssm takes when it is absent."""

    field: str
    default: Any


COMMON = {
    "d_conv": Option("conv_kernel", 4),
    "expand": Option("expand", 2),
    "dt_min": Option("time_step_min", 0.001),
    "dt_max": Option("time_step_max", 0.1),
    "dt_init_floor": Option("time_step_floor", 1e-4),
    "conv_bias": Option("use_conv_bias", True),
    "bias": Option("use_bias", False),
}
OPTIONS = {
    "Mamba1": COMMON
    | {
        "d_state": Option("state_size", 16),
        "dt_rank": Option("time_step_rank", "auto"),
        "dt_init": Option("time_step_init_scheme", "random"),
        "dt_scale": Option("time_step_scale", 1.0),
    },
    "Mamba2": COMMON
    | {
        "d_state": Option("state_size", 128),
        "headdim": Option("head_dim", 64),
        "ngroups": Option("n_groups", 1),
        "dt_limit": Option("time_step_limit", [0.0, math.inf]),
        "chunk_size": Option("chunk_size", 256),
    },
}
SPEED = {"use_fast_path", "use_mem_eff_path", "sequence_parallel"}
# Options of Mamba-2 that transformers lacks: of the first draw of the weights, and of what the layer computes.
INITIAL = {"conv_init", "A_init_range"}
HYBRID_ONLY = {"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
LAYERS: dict[str, type] = {"Mamba1": Mamba, "Mamba2": Mamba2}
ATTENTION = {
    *("num_heads", "num_heads_kv", "head_dim", "mlp_dim", "qkv_proj_bias", "out_proj_bias", "softmax_scale", "causal"),
    *("d_conv", "rotary_emb_dim", "rotary_emb_base", "rotary_emb_interleaved"),
}

# Fields of transformers that mamba_ssm fixes; those that are written elsewhere or change nothing the weights compute.
FIXED = {"hidden_act": "silu", "layer_norm_epsilon": 1e-5, "rms_norm": True, "norm_before_gate": False}
ACCOUNTED = {
    *TOKEN_IDS,
    RECORD,
    "d_inner",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "num_heads",
    "num_hidden_layers",
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "tie_word_embeddings",
    "time_step_rank",
    "use_associative_scan",
    "use_cache",
    "use_mambapy",
    "vocab_size",
}


def recognises(source: Source) -> bool:
    """Whether the folder holds this format: mamba_ssm's keys, no model_type, and weights."""
    config = source.json("config.json") or {}
    return "model_type" not in config and "d_model" in config and bool(_files(source))


def read(source: Source) -> Checkpoint:
    """Read a checkpoint; see `config_from` for what its configuration becomes."""
    raw, tensors = source.json("config.json") or {}, read_tensors(_files(source))
    require_depth(raw.get("n_layer"), tensors)
    config = config_from(raw)
    if (ids := source.json("generation_config.json")) is not None:
        set_token_ids(config, {key: ids.get(key) for key in TOKEN_IDS})
    return assemble(config, tensors, source)


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint as mamba_ssm's own `save_pretrained` does: its `from_pretrained` reads only that file."""
    raw = config_to(checkpoint.config)
    tensors: dict[str, Tensor] = dict(checkpoint.tensors)
    tensors[EMBEDDING] = tensors.pop(EMBEDDINGS)
    if raw["tie_embeddings"]:
        tensors[HEAD] = tensors[EMBEDDING]
    write_json(folder / "config.json", raw)
    write_torch(folder / "pytorch_model.bin", tensors)
    checkpoint.copy_companions(folder)
    if not (folder / "generation_config.json").exists():
        # mamba_ssm's configuration has no place for the special tokens.
        ids = {key: getattr(checkpoint.config, key) for key in TOKEN_IDS}
        GenerationConfig(**ids).save_pretrained(folder)


def _files(source: Source) -> list[Path]:
    return source.files("model", ".safetensors") or source.files("pytorch_model", ".bin")


def config_from(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a mamba_ssm model: MambaConfig or Mamba2Config if it is plain, else HybridConfig.

    Its vocab_size counts the padding, as transformers does: the rows of the embedding.

    Raises:
        CheckpointError: a field is missing or unknown, or a value is not supported.
    """
    if missing := [key for key in REQUIRED if raw.get(key) is None]:
        raise CheckpointError(f"mamba_ssm's configuration lacks {', '.join(missing)}: add it")
    if unknown := raw.keys() - DEFAULTS.keys() - set(REQUIRED):
        raise CheckpointError(f"mamba_ssm has no {', '.join(sorted(unknown))} in its configuration: remove it")
    raw = {**DEFAULTS, **{key: value for key, value in raw.items() if value is not None}}
    for key, value in raw.items():
        if not isinstance(value, kind := type(DEFAULTS.get(key, 0))):
            raise CheckpointError(f"mamba_ssm's configuration has {key} {value!r}: it must be of type {kind.__name__}")
    if raw["pad_vocab_size_multiple"] < 1:
        raise CheckpointError(f"pad_vocab_size_multiple is {raw['pad_vocab_size_multiple']}: it must be at least 1")
    options = dict(raw["ssm_cfg"])
    layer = options.pop("layer", "Mamba1")
    _require_options(layer, options)
    if _is_plain(raw, options):
        kind, fields, recorded = _plain_fields(raw, layer, options)
    else:
        kind, fields, recorded = _hybrid_fields(raw, layer, options)
    record = {key: raw[key] for key in RECORDED}
    record["ssm_cfg"] = {key: options[key] for key in sorted(recorded & options.keys())}
    fields |= {
        "hidden_size": raw["d_model"],
        "num_hidden_layers": raw["n_layer"],
        "vocab_size": padded_vocabulary(raw),
        "residual_in_fp32": raw["residual_in_fp32"],
        "tie_word_embeddings": raw["tie_embeddings"],
        RECORD: record,
    }
    config = make_config(kind, fields)
    set_token_ids(config, dict.fromkeys(TOKEN_IDS, 0))
    return config


def padded_vocabulary(raw: Mapping[str, Any]) -> int:
    """Rows of the embedding: vocab_size rounded up to pad_vocab_size_multiple."""
    return -(-raw["vocab_size"] // raw["pad_vocab_size_multiple"]) * raw["pad_vocab_size_multiple"]


def set_token_ids(config: PreTrainedConfig, ids: Mapping[str, Any]) -> None:
    """Set the special tokens, of which mamba_ssm's configuration says nothing (its models use GPT-NeoX's, all 0)."""
    for key, value in ids.items():
        setattr(config, key, value)


def _require_options(layer: str, options: Mapping[str, Any]) -> None:
    if not isinstance(layer, str) or layer not in OPTIONS:
        raise CheckpointError(f"ssm_cfg's layer is {layer!r}: {' and '.join(OPTIONS)} are built")
    known = OPTIONS[layer].keys() | SPEED
    if layer == "Mamba2":
        known |= INITIAL | HYBRID_ONLY.keys()
    if unknown := options.keys() - known:
        raise CheckpointError(f"ssm_cfg has {', '.join(sorted(unknown))}, which {layer} does not know: remove it")
    if options.get("norm_before_gate"):
        raise CheckpointError("ssm_cfg's norm_before_gate is true: only norms after the gate are built")


def _require_attention(options: Mapping[str, Any]) -> None:
    if unknown := options.keys() - ATTENTION:
        raise CheckpointError(f"attn_cfg has {', '.join(sorted(unknown))}, which mamba_ssm does not know: remove it")
    if options.get("rotary_emb_interleaved"):
        raise CheckpointError("attn_cfg's rotary_emb_interleaved is true: only the rotation in halves is built")
    if not options.get("causal"):
        raise CheckpointError("attn_cfg's causal is false (mamba_ssm's default): a language model needs it true")


def _is_plain(raw: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether transformers' own configurations can say everything about the model."""
    return (
        raw["rms_norm"]
        and not raw["d_intermediate"]
        and not raw["attn_layer_idx"]
        and not raw["attn_cfg"]
        and isinstance(options.get("expand", 2), int)
        and all(options.get(key, value) == value for key, value in HYBRID_ONLY.items())
    )


Fields = tuple[type[PreTrainedConfig], dict[str, Any], set[str]]


def _plain_fields(raw: Mapping[str, Any], layer: str, options: Mapping[str, Any]) -> Fields:
    """transformers' class, the fields that are particular to it, and the options of ssm_cfg that are only recorded."""
    fields = {option.field: options.get(key, option.default) for key, option in OPTIONS[layer].items()}
    if layer == "Mamba1":
        return MambaConfig, fields, SPEED
    if not isinstance(fields["head_dim"], int) or fields["head_dim"] < 1:
        raise CheckpointError(f"ssm_cfg's headdim is {fields['head_dim']!r}: it must be a number of channels")
    fields["num_heads"] = raw["d_model"] * fields["expand"] // fields["head_dim"]
    return Mamba2Config, fields, SPEED | INITIAL


def _hybrid_fields(raw: Mapping[str, Any], layer: str, options: Mapping[str, Any]) -> Fields:
    """The same for mambalm's hybrid, which keeps mamba_ssm's names and values."""
    if raw["attn_layer_idx"]:
        _require_attention(raw["attn_cfg"])
    attention = {key: value for key, value in raw["attn_cfg"].items() if key != "rotary_emb_interleaved"}
    # mambalm's Mamba2 has another default.
    layer_options = {"layer": layer, "d_state": OPTIONS[layer]["d_state"].default, **options}
    fields = {key: raw[key] for key in ("d_intermediate", "attn_layer_idx", "rms_norm", "pad_vocab_size_multiple")}
    fields["ssm_cfg"] = {key: value for key, value in layer_options.items() if key not in SPEED}
    return HybridConfig, fields | {"attn_cfg": attention}, SPEED


def config_to(config: PreTrainedConfig) -> dict[str, Any]:
    """mamba_ssm's configuration of a model.

    Raises:
        CheckpointError: a field of the configuration has no counterpart in mamba_ssm.
    """
    layers = {"mamba": "Mamba1", "mamba2": "Mamba2"}
    raw = dict(DEFAULTS)
    if isinstance(config, HybridConfig):
        layer, values = _hybrid_layer(config)
        raw |= {key: getattr(config, key) for key in ("d_intermediate", "attn_layer_idx", "attn_cfg", "rms_norm")}
        if config.attn_layer_idx:
            raw["attn_cfg"] = {"causal": True, **raw["attn_cfg"]}
            _require_attention(raw["attn_cfg"])
        _require_counterparts(config, {"rms_norm"})
    elif config.model_type in layers:
        layer = layers[config.model_type]
        values = {key: getattr(config, option.field) for key, option in OPTIONS[layer].items()}
        _require_counterparts(config, {option.field for option in OPTIONS[layer].values()})
    else:
        raise CheckpointError(f"a {config.model_type} model has no counterpart in mamba_ssm: write it as transformers")
    record = getattr(config, RECORD, {})
    return raw | {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        **_raw_vocabulary(config, record),
        "ssm_cfg": _raw_options(layer, values, config.hidden_size) | record.get("ssm_cfg", {}),
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": record.get("fused_add_norm", DEFAULTS["fused_add_norm"]),
        "tie_embeddings": config.tie_word_embeddings,
    }


def _hybrid_layer(config: HybridConfig) -> tuple[str, dict[str, Any]]:
    """The recurrent layer of a hybrid, and its options; those that mambalm's layer takes by default among them."""
    options = dict(config.ssm_cfg or {})
    layer = options.pop("layer", "Mamba1")
    options.setdefault("d_state", signature(LAYERS[layer]).parameters["d_state"].default)
    _require_options(layer, options)
    return layer, options


def _raw_options(layer: str, values: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    """ssm_cfg of some options, without those that mamba_ssm takes anyway."""
    defaults = {key: option.default for key, option in OPTIONS[layer].items()} | HYBRID_ONLY
    options: dict[str, Any] = {} if layer == "Mamba1" else {"layer": layer}
    for key, value in values.items():
        value = list(value) if isinstance(value, tuple) else value
        is_auto = key == "dt_rank" and value == math.ceil(d_model / 16)  # transformers writes the number out
        if not is_auto and (key not in defaults or value != defaults[key]):
            options[key] = value
    return options


def _raw_vocabulary(config: PreTrainedConfig, record: Mapping[str, Any]) -> dict[str, int]:
    """vocab_size and its multiple: those once read if they still give the embedding's rows, else the rows."""
    rows = config.vocab_size
    if "vocab_size" in record and padded_vocabulary(record) == rows:
        return {key: record[key] for key in ("vocab_size", "pad_vocab_size_multiple")}
    multiple = getattr(config, "pad_vocab_size_multiple", 1)
    return {"vocab_size": rows, "pad_vocab_size_multiple": multiple if rows % multiple == 0 else 1}


def _require_counterparts(config: PreTrainedConfig, mapped: set[str]) -> None:
    """Raise if a field says something that mamba_ssm's configuration could not."""
    for field, value in FIXED.items():
        if field not in mapped and getattr(config, field, value) != value:
            raise CheckpointError(
                f"{field} is {getattr(config, field)!r}, and mamba_ssm always takes {value!r}: write it as transformers"
            )
    if config.model_type == "mamba" and config.intermediate_size != config.expand * config.hidden_size:
        raise CheckpointError(
            f"intermediate_size is {config.intermediate_size}, and mamba_ssm takes expand * d_model = "
            f"{config.expand * config.hidden_size}: set expand to their ratio, or write it as transformers"
        )
    known = mapped | FIXED.keys() | ACCOUNTED | DEFAULTS.keys() | set(REQUIRED)
    if unknown := config.to_dict().keys() - known - PreTrainedConfig().to_dict().keys():
        raise CheckpointError(f"{', '.join(sorted(unknown))} has no counterpart in mamba_ssm: write it as transformers")
