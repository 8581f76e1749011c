"""A recipe with an adapter: chats in, the adapters alone out, resumed from its checkpoints."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.distributed.checkpoint import FileSystemReader
from transformers import MambaConfig, PreTrainedTokenizerFast

from mambalm.models import MambaForCausalLM, load_adapter
from mambalm.models.loading import load
from mambalm.training import distributed
from mambalm.training.model import size_of
from mambalm.training.recipe import Recipe
from mambalm.training.session import Folder, open_trainer, run
from tests.data.test_chat import MARKED, with_template
from tests.helpers import FLOAT32, relative_error
from tests.training.runs import finish


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


def four_bits(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The recipe as QLoRA, measured in the middle, on a size that bitsandbytes multiplies on a CPU."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=64, state_size=8, num_hidden_layers=2, eos_token_id=0)
    MambaForCausalLM(config).save_pretrained(recipe["model"]["start"])
    data = recipe["data"] | {"held_out": 0.2}
    return recipe | {"adapter": {"rank": 4, "alpha": 8, "four_bits": True}, "data": data} | changes


def frozen_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if not value.requires_grad}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recipe_trains_adapters_on_four_bits(recipe: dict[str, Any], tmp_path: Path, precision: str) -> None:
    settled = Recipe.model_validate(four_bits(recipe, precision=precision, evaluation={"every": 3, "sequences": 4}))
    folder, shown = Folder(tmp_path / "run"), io.StringIO()
    with distributed.ranks(torch.device("cpu")) as ranks:
        fresh = frozen_weights(open_trainer(settled, folder, ranks).network)
        assert not run(settled, folder.path, ranks, Console(file=shown))
        last = open_trainer(settled, folder, ranks)
    assert "adapted: dt_proj x 2, in_proj x 2, out_proj x 2, x_proj x 2" in " ".join(shown.getvalue().split())
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["held_out/loss"] for line in lines if "held_out/loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert held_out[-1] < held_out[0] - 0.1
    # Saved and measured again and again, the 4-bit weights are what they were.
    after = frozen_weights(last.network)
    assert any(value.dtype == torch.uint8 for value in after.values())
    for name, value in fresh.items():
        assert torch.equal(after[name], value), name
    packed = sum(value.numel() for value in after.values() if value.dtype == torch.uint8)
    trained = sum(parameter.numel() for parameter in last.network.parameters() if parameter.requires_grad)
    # Two weights in a byte, a float32 scale for 64 of them.
    frozen = sum(value.nbytes for value in after.values()) + 4 * 2 * packed // 64
    assert size_of(settled).state_bytes == frozen + 16 * trained
    kept = FileSystemReader(folder.checkpoints / "step-8").read_metadata().state_dict_metadata
    assert [name for name in kept if ".lora_" not in name and not name.startswith("optimizer.param_groups")] == []


def test_adapters_on_four_bits_are_resumed_exactly(recipe: dict[str, Any], tmp_path: Path) -> None:
    settled = Recipe.model_validate(four_bits(recipe))
    with distributed.ranks(torch.device("cpu")) as ranks:
        whole = open_trainer(settled, Folder(tmp_path / "whole"), ranks)
        losses = finish(whole)
        first = open_trainer(settled, Folder(tmp_path / "parts"), ranks)
        assert finish(first, 5) == losses[:5]
        first.measure()
        first.save()
        first.checkpoints.wait()
        # What was saved and measured goes on as if it had not been.
        assert finish(first, 7) == losses[5:7]
        assert finish(open_trainer(settled, Folder(tmp_path / "parts"), ranks)) == losses[5:]


def test_what_four_bits_cannot_do_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not sharded: set parallel\.mode to single or ddp"):
        Recipe.model_validate(four_bits(recipe, parallel={"mode": "fsdp"}))
    config = MambaConfig(vocab_size=300, hidden_size=48, state_size=8, num_hidden_layers=2, eos_token_id=0)
    MambaForCausalLM(config).save_pretrained(recipe["model"]["start"])
    settled = Recipe.model_validate(recipe | {"adapter": {"four_bits": True}})
    with pytest.raises(ValueError, match=r"in_proj has 48 inputs and 192 outputs, and on a CPU bitsandbytes"):
        open_trainer(settled, Folder(tmp_path / "run"), distributed.Ranks())


def test_an_adapter_needs_a_checkpoint(recipe: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs a checkpoint that stays as it is: set model\.start"):
        Recipe.model_validate(recipe | {"model": {}})
