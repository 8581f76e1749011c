"""Tiny runs for the tests: a recipe, token files of a text that can be learned, a tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerFast

from mambalm.data.token_files import METADATA, Metadata
from mambalm.data.tokenizer import tokenizer_fingerprint, train_tokenizer
from mambalm.training.distributed import Ranks
from mambalm.training.recipe import Recipe
from mambalm.training.session import Folder, open_trainer
from mambalm.training.trainer import Trainer
from tests.data.folders import write_folder

VOCABULARY = 272

RECIPE = """
name: test
tokenizer: {folder}/tokenizer
model:
  family: mamba
  config:
    vocab_size: 272
    hidden_size: 16
    num_hidden_layers: 2
    state_size: 4
    tie_word_embeddings: true
    initializer_range: 0.02
data:
  sources:
    - path: {folder}/tokens
  held_out: 0.2
schedule: {{kind: wsd, peak: 1.0e-2, warmup: 100, decay: 400}}
stages:
  - name: short
    tokens: 768
    context: 16
    batch: 8
    micro_batch: 4
    ramp: {{start: 2, tokens: 256, batch_scaling: true}}
  - {{name: long, tokens: 512, context: 32, batch: 4, micro_batch: 2}}
precision: fp32
checkpoints: {{every: 4}}
logging: {{every: 1, layers: 0, plot: 0}}
evaluation: {{every: 0, sequences: 4}}
"""


def write_data(folder: Path) -> None:
    """A tokenizer, and documents that count on in steps of their own."""
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(["def count(): return 1\n" * 4], VOCABULARY)
    tokenizer.save_pretrained(folder / "tokenizer")
    generator = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(120):
        start, step, length = (int(torch.randint(1, high, (), generator=generator)) for high in (250, 4, 40))
        documents.append([1 + (start + step * i) % 250 for i in range(length + 5)])
    write_folder(folder / "tokens", [documents], vocab_size=VOCABULARY)
    path = folder / "tokens" / METADATA
    metadata = Metadata.read(folder / "tokens")
    zeros = [field.name for field in dataclasses.fields(metadata) if getattr(metadata, field.name) == "0" * 16]
    found = dict.fromkeys(zeros, tokenizer_fingerprint(tokenizer))
    path.write_text(dataclasses.replace(metadata, **found).to_json())


def recipe(folder: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe on the data in a folder, with top-level sections replaced."""
    values = yaml.safe_load(RECIPE.format(folder=folder))
    return Recipe.model_validate(values | dict(changes or {}))


def trainer(made: Recipe, output: Path) -> Trainer:
    """The trainer of a recipe in this process."""
    return open_trainer(made, Folder(output), Ranks())


def finish(made: Trainer, steps: int = 10**6) -> list[float]:
    """The losses of the steps up to the end, or up to so many."""
    losses = []
    while not made.is_over and made.position.step < steps:
        losses.append(float(made.advance().values["loss"]))
    return losses
