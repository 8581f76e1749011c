"""What every format is read into and written from: a configuration and its tensors, under transformers' names."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from mambalm.models.formats.io import CheckpointError, Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EMBEDDINGS = "backbone.embeddings.weight"
HEAD = "lm_head.weight"
# What lies beside the weights and belongs to the model whatever their format is.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template*",
)
# In which models compute; the 8-bit floating-point ones have no arithmetic.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# So many names are printed of a longer list.
SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, the tensors still on disk (memory-mapped) and in the file's dtypes.

    Attributes:
        config: transformers' configuration, or mambalm's where transformers has none.
        tensors: by transformers' names; a tied head is not among them.
        folder: where it was read, for the files beside the weights.
    """

    config: PreTrainedConfig
    tensors: dict[str, Tensor]
    folder: Path

    def cast(self, dtype: torch.dtype | None) -> Checkpoint:
        """The same checkpoint in one dtype; None keeps each tensor's."""
        if dtype is None:
            return self
        return replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    def copy_companions(self, folder: Path) -> None:
        """Copy the tokenizer and the generation settings, where there are any."""
        for path in sorted({path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}):
            shutil.copyfile(path, folder / path.name)


def require_depth(layers: Any, tensors: Mapping[str, Tensor]) -> None:
    """Compare the layers that a configuration tells of with the tensors, before anything is built of so many.

    Raises:
        CheckpointError: there are more layers than tensors.
    """
    if isinstance(layers, int) and layers > len(tensors):
        raise CheckpointError(
            f"the configuration has {layers:,} layers, the weights have {len(tensors):,} tensors in all: it is damaged "
            "or another model's; use the one saved with these weights"
        )


def make_config(kind: type[PreTrainedConfig], fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration of its fields; CheckpointError if one is of the wrong type or they contradict each other."""
    try:
        return kind.from_dict(dict(fields))
    except (StrictDataclassError, AttributeError, IndexError, TypeError, ValueError) as error:
        # transformers breaks its messages into lines; it looks a dtype up as an attribute of torch.
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the configuration is not a valid {kind.__name__}: {reason}") from error


def assemble(config: PreTrainedConfig, tensors: Mapping[str, Tensor], source: Source) -> Checkpoint:
    """A checkpoint of tensors that a format has read and renamed: ties resolved, dtypes noted.

    Raises:
        CheckpointError: the head should be the embeddings and is not, or a tensor is not floating point.
    """
    tensors = dict(tensors)
    # The name that mamba_ssm gives them, also found in early checkpoints in transformers' format.
    if (embeddings := tensors.pop("backbone.embedding.weight", None)) is not None:
        tensors[EMBEDDINGS] = embeddings
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{name} is {tensor.dtype}, expected a floating-point dtype of 16 bits or more: a quantised checkpoint "
                "is not read here; load the original, or use transformers with mambalm.register()"
            )
    if config.tie_word_embeddings:
        _untie(tensors)
    if tensors and config.dtype is None:
        config.dtype = main_dtype(tensors)
    return Checkpoint(config, tensors, source.folder)


def _untie(tensors: dict[str, Tensor]) -> None:
    """Leave one tensor of a tied pair, under the embeddings' name; either may be the one that was saved."""
    head = tensors.pop(HEAD, None)
    if head is None:
        return
    embeddings = tensors.setdefault(EMBEDDINGS, head)
    if embeddings.shape != head.shape or not torch.equal(embeddings, head):
        raise CheckpointError(
            f"{HEAD} {tuple(head.shape)} differs from {EMBEDDINGS} {tuple(embeddings.shape)}, and the configuration "
            "ties them: set tie_word_embeddings (mamba_ssm: tie_embeddings) to false to keep both"
        )


def main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that most of the numbers have; one word of a configuration has to say it for all."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def require_match(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    """Compare a checkpoint's tensors with those of the model that its configuration builds.

    Args:
        checkpoint: what was read.
        expected: the model's state dict, of which the shapes are read.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    found = checkpoint.tensors
    tied = {HEAD} if checkpoint.config.tie_word_embeddings else set()
    for name in expected.keys() & found.keys():
        _require_shape(name, found[name], expected[name])
    missing, unexpected = expected.keys() - found.keys() - tied, found.keys() - expected.keys()
    problems = []
    if missing:
        shapes = {name: tuple(expected[name].shape) for name in missing}
        problems.append(f"lacks {_listed(f'{name} {shapes[name]}' for name in sorted(missing))}")
    if unexpected:
        shapes = {name: tuple(found[name].shape) for name in unexpected}
        problems.append(f"has {_listed(f'{name} {shapes[name]}' for name in sorted(unexpected))} in excess")
    if problems:
        raise CheckpointError(
            f"{checkpoint.folder} {' and '.join(problems)} for a {checkpoint.config.model_type} model: the "
            "configuration is another model's, or files are missing or mixed; compare its number of layers and its "
            "options with the weights"
        )


def _require_shape(name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape == expected.shape:
        return
    rows = found.shape[0] if found.ndim == 2 else None
    vocabulary = name in (EMBEDDINGS, HEAD) and found.shape[1:] == expected.shape[1:]
    raise CheckpointError(
        f"{name} has shape {tuple(found.shape)} in the file and {tuple(expected.shape)} by the configuration: "
        + (
            f"the vocabularies differ; set vocab_size to {rows} (mamba_ssm: vocab_size rounded up to "
            "pad_vocab_size_multiple), or use the tokenizer and weights of one model"
            if vocabulary
            else "the configuration belongs to a model of another size; use the one saved with these weights"
        )
    )


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    rest = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
