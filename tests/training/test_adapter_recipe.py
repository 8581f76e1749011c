"""A recipe with an adapter: chats in, the adapters alone out, resumed from its checkpoints."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import MambaConfig, PreTrainedTokenizerFast

from mambalm.models import MambaForCausalLM, load_adapter
from mambalm.models.loading import load
from mambalm.training import distributed
from mambalm.training.model import size_of
from mambalm.training.recipe import Recipe
from mambalm.training.session import Folder, open_trainer, run
from tests.data.test_chat import MARKED, with_template
from tests.helpers import FLOAT32, relative_error


@pytest.fixture
def recipe(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    with_template(tiny_tokenizer, MARKED).save_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=32, state_size=8, num_hidden_layers=2, eos_token_id=0)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    talks = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "def sorted(fox)"}] for i in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return {
        "name": "adapter",
        "tokenizer": str(tmp_path / "tokenizer"),
        "model": {"start": str(tmp_path / "model")},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"sources": [{"path": str(tmp_path / "chats.jsonl"), "kind": "chat"}]},
        "schedule": {"kind": "cosine", "peak": 2e-2, "warmup": 128},
        "stages": [{"name": "chats", "tokens": 64 * 4 * 10, "context": 64, "batch": 4, "micro_batch": 4}],
        "precision": "fp32",
        "checkpoints": {"every": 4},
        "logging": {"every": 1},
    }


def test_a_recipe_trains_adapters_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    settled = Recipe.model_validate(recipe)
    folder = Folder(tmp_path / "run")
    shown = io.StringIO()
    with distributed.ranks(torch.device("cpu")) as ranks:
        assert not run(settled, folder.path, ranks, Console(file=shown))
        trainer = open_trainer(settled, folder, ranks)
    assert "adapted: dt_proj x 2, in_proj x 2, out_proj x 2, x_proj x 2" in " ".join(shown.getvalue().split())
    assert not folder.model.exists()
    losses = [json.loads(line).get("loss") for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0] - 0.5
    base = load(recipe["model"]["start"])
    for name, parameter in base.named_parameters():
        kept = dict(trainer.network.named_parameters())
        same = kept.get(name, kept.get(f"{name.removesuffix('.weight')}.base_layer.weight"))
        same = kept.get(f"{name.removesuffix('.bias')}.base_layer.bias") if same is None else same
        assert torch.equal(same, parameter), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        # What was exported is what the last checkpoint holds, and it does something.
        expected = trainer.network.eval()(ids).logits
        adapted, report = load_adapter(base, folder.adapter)
        assert relative_error(adapted(input_ids=ids).logits, expected) <= FLOAT32
        assert relative_error(expected, load(recipe["model"]["start"])(ids).logits) > 0.01
    assert size_of(settled).parameters == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert report.trainable == 0


def test_an_adapter_needs_a_checkpoint(recipe: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs a checkpoint that stays as it is: set model\.start"):
        Recipe.model_validate(recipe | {"model": {}})
