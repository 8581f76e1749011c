"""The model of a run's checkpoint in transformers' format, while the run goes on or after it."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import nn

from mambalm.data.tokenizer import load_tokenizer
from mambalm.models.formats import written_whole
from mambalm.models.quiet import without_bars
from mambalm.training.checkpoint import Checkpoints
from mambalm.training.model import build_model
from mambalm.training.session import Folder


def export_checkpoint(
    run: Path,
    destination: Path,
    *,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> int:
    """Write the model that a run had at a checkpoint, with its tokenizer, as `mambalm.load` and transformers read it.

    Args:
        run: the run's folder.
        destination: the folder to write, which appears when it is complete.
        step: of the checkpoint; None: the latest.
        dtype: of the parameters, whose masters are float32.
        overwrite: replace a destination that is not empty.

    Returns:
        The step.

    Raises:
        ValueError: there is no run or no such checkpoint, it is damaged, or of adapters.
    """
    from mambalm.training.recipe import Recipe

    folder = Folder(run)
    if not folder.recipe.is_file():
        raise ValueError(f"{run} is no run's folder: it has no {folder.recipe.name}")
    recipe = Recipe.model_validate(yaml.safe_load(folder.recipe.read_text()))
    if recipe.adapter is not None:
        raise ValueError(f"{run} trains adapters, which it writes into {folder.adapter} at its end: nothing to export")
    kept = Checkpoints(folder.checkpoints, read_only=True)
    step = kept.latest() if step is None else step
    if step is None:
        raise ValueError(f"{run} has no checkpoint yet: wait for one, or lower checkpoints.every")
    tokenizer = load_tokenizer(recipe.tokenizer)
    # Nothing is drawn or read that the checkpoint replaces.
    model = build_model(recipe, tokenizer, sharded=True)
    nn.Module.float(model).to_empty(device="cpu")
    model.tie_weights()
    kept.load_model(model, step)
    nn.Module.to(model, dtype).eval()
    model.config.dtype = dtype
    with written_whole(destination, overwrite=overwrite) as partial:
        with without_bars():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return step
