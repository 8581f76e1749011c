"""The model of a recipe: made anew, or a checkpoint's."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from mambalm.data.tokenizer import load_tokenizer
from mambalm.models import FalconMambaForCausalLM, Mamba2ForCausalLM, MambaForCausalLM
from mambalm.models.common import MambalmForCausalLM
from mambalm.models.hybrid import MambaHybridForCausalLM
from mambalm.models.loading import load
from mambalm.models.quantized import DEFAULT_SKIPS
from mambalm.training.adapters import Adapter, load_four_bits, put_on
from mambalm.training.parts import put_whole
from mambalm.training.precision import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from mambalm.training.recipe import ModelSection, Recipe

_FAMILIES: Mapping[str, type[MambalmForCausalLM]] = {
    "mamba": MambaForCausalLM,
    "falcon_mamba": FalconMambaForCausalLM,
    "mamba2": Mamba2ForCausalLM,
    "hybrid": MambaHybridForCausalLM,
}
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "state_size", "conv_kernel", "expand"),
    *("time_step_rank", "num_heads", "head_dim", "n_groups", "chunk_size"),
)
# Bytes of kept activations for every token and channel inside a block, measured on a GPU with Mamba models of 130M to
# 2.8B parameters under bfloat16 autocast (docs/decisions/2026-11-27-whole-models-on-h200.md); other families are near.
_KEPT = {"none": 15.5, "selective": 10.5}


def config_of(section: ModelSection) -> PreTrainedConfig:
    """The configuration of a recipe's model; a field that is null takes a base's out.

    Raises:
        ValueError: the family has no such field, which transformers would have taken without a word, or no such value.
    """
    kind: Any = _FAMILIES[section.family].config_class
    values = {name: value for name, value in section.config.items() if value is not None}
    known = list(kind().to_dict())
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown key model.config.{name} of family {section.family}{hint}")
        if name in _SIZES and isinstance(values[name], int) and values[name] < 1:
            raise ValueError(f"model.config.{name} is {values[name]}: it must be 1 at least")
    try:
        return kind(**values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"model.config does not fit family {section.family}: {error.__cause__ or error}") from error


def build_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None = None,
    precision: Policy | None = None,
    *,
    sharded: bool = False,
) -> MambalmForCausalLM:
    """The float32 model before the first step, where it is to run; one in 4 bits otherwise as in its file.

    Args:
        recipe: which one.
        tokenizer: of its token files, whose special tokens it gets.
        precision: where it is to run, and what one in 4 bits computes in; float32 on the CPU by default.
        sharded: it is to be spread by `parallelise`, which draws or reads then: a new one is on the meta device, and
            the parameters of a checkpoint are its files' pages, in its dtypes.

    Raises:
        ValueError: the configuration does not fit, or the tokenizer has more tokens than the model.
    """
    section = recipe.model
    precision = precision or Policy(torch.device("cpu"))
    elsewhere = precision.device.type != "cpu"
    if section.start is None:
        torch.manual_seed(recipe.seed)
        with torch.device("meta" if sharded or elsewhere else "cpu"):
            model = _FAMILIES[section.family](config_of(section))
        if elsewhere and not sharded:
            put_whole(model, recipe.seed, precision.device)
    elif recipe.adapter is not None and recipe.adapter.four_bits:
        dtype = precision.compute_dtype
        others = torch.float32 if dtype == torch.float32 else None
        model = load_four_bits(section.start, precision.device, others, dtype)
    else:
        # New embeddings are drawn by the CPU's generator, as they are everywhere.
        device = "cpu" if sharded or section.new_embeddings else precision.device
        model = load(section.start, dtype=None if sharded else torch.float32, device=device)
        if section.new_embeddings:
            _renew_embeddings(model, tokenizer, recipe.seed)
    if tokenizer is not None:
        if section.start is not None and not section.new_embeddings:
            _require_same_tokens(section.start, tokenizer, recipe.tokenizer)
        require_vocabulary(model.config.vocab_size, len(tokenizer), recipe.tokenizer)
        model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        padding = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.eos_token_id if padding is None else padding
    model.config.use_cache = True
    return model.train()


def require_vocabulary(rows: int, tokens: int, name: str) -> None:
    """Refuse token ids that the embeddings have no row for.

    Raises:
        ValueError: there are such.
    """
    if tokens > rows:
        raise ValueError(
            f"{name} has {tokens:,} tokens, the model's vocabulary {rows:,}: set model.config.vocab_size to at least "
            f"that, or, for a model that is continued, model.new_embeddings=true"
        )


def _require_same_tokens(start: str, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that gives a token of the checkpoint's own another number; new tokens it may have."""
    try:
        known = load_tokenizer(start).get_vocab()
    except ValueError:  # the checkpoint has none
        return
    here = tokenizer.get_vocab()
    for token, number in known.items():
        if here.get(token, number) != number:
            raise ValueError(
                f"{name} has the token {token!r} as number {here[token]}, and the checkpoint {start} as {number}: take "
                f"the checkpoint's tokenizer, or draw embeddings for this one with model.new_embeddings=true"
            )


def _renew_embeddings(model: MambalmForCausalLM, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
    """Embeddings and head for another tokenizer, drawn anew."""
    if tokenizer is None:
        raise ValueError("new_embeddings needs the tokenizer that they are for")
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        nn.Module.to(module, torch.float32)
    model.tie_weights()
    torch.manual_seed(seed)
    model.resize_token_embeddings(-(-len(tokenizer) // 8) * 8, mean_resizing=False)
    deviation = getattr(model.config, "initializer_range", 0.02)
    modules: Any = (model.get_input_embeddings(), model.get_output_embeddings())
    for module in modules:
        nn.init.normal_(module.weight, std=deviation)


@dataclass(frozen=True)
class Size:
    """What a recipe takes.

    Attributes:
        parameters: trained numbers; tied weights count once.
        state_bytes: parameters, as float32 but for those in 4 bits, and gradients and both moments of those trained, on
            all ranks together.
        activation_bytes: what a micro-batch keeps for its backward, about, by stage.
    """

    parameters: int
    state_bytes: int
    activation_bytes: tuple[int, ...]


def size_of(recipe: Recipe) -> Size:
    """Count a recipe's parameters, and estimate its memory."""
    with torch.device("meta"):
        if recipe.model.start is None:
            model = _FAMILIES[recipe.model.family](config_of(recipe.model))
        else:
            model = load(recipe.model.start, device="meta")
            if recipe.model.new_embeddings:
                _renew_embeddings(model, load_tokenizer(recipe.tokenizer), recipe.seed)
        if recipe.adapter is not None:
            put_on(model, Adapter(**recipe.adapter.model_dump()))
    four_bits = recipe.adapter is not None and recipe.adapter.four_bits
    weights = sum(_weight_bytes(name, parameter, four_bits) for name, parameter in model.named_parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Size(
        trained,
        round(weights) + 12 * trained,
        tuple(_activations(recipe, model.config, i) for i in range(len(recipe.stages))),
    )


def _weight_bytes(name: str, parameter: nn.Parameter, four_bits: bool) -> float:
    """Of a parameter in training; of one in 4 bits with the float32 scale of every 64."""
    projection = ".layers." in name and parameter.ndim == 2 and name.endswith(".weight") and ".lora_" not in name
    if four_bits and projection and not any(f".{skipped}." in name for skipped in DEFAULT_SKIPS):
        return parameter.numel() * (4 + 32 / 64) / 8
    return 4 * parameter.numel()


def _activations(recipe: Recipe, config: Any, stage: int) -> int:
    width = getattr(config, "intermediate_size", None) or max(
        2 * config.hidden_size, getattr(config, "d_intermediate", 0)
    )
    section = recipe.stages[stage]
    tokens = section.micro_batch * section.context
    kept = recipe.parallel.checkpointing
    if kept == "full":
        # The residual stream before every block in float32, and one block in full.
        return int(tokens * (4 * config.hidden_size * config.num_hidden_layers + _KEPT["none"] * width))
    scale = 1 if recipe.precision in ("bf16", "fp16") else 2
    return int(scale * tokens * config.num_hidden_layers * _KEPT[kept] * width)
