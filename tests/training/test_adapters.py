"""LoRA and QLoRA on conversations: every projection changes, the loss falls, what is saved is what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import MambaConfig, PreTrainedTokenizerFast

from mambalm.data.mixture import Mixture, Source, open_stream
from mambalm.data.samples import Batch, collate
from mambalm.models import MambaForCausalLM, load_adapter
from mambalm.models.formats import CheckpointError
from mambalm.models.loading import load
from mambalm.training.adapters import Adapted, Adapter, start
from mambalm.training.optimizer import adamw, set_learning_rate
from tests.data.test_chat import MARKED, with_template
from tests.helpers import FLOAT32, relative_error

PROJECTIONS = {"dt_proj", "in_proj", "out_proj", "x_proj"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    # bitsandbytes on a CPU wants multiples of 64 inputs and of 32 outputs.
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=64, state_size=8, num_hidden_layers=2, eos_token_id=0)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def batch(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Batch:
    path = tmp_path / "chats.jsonl"
    answers = ["def quick", "sorted", "the brown fox", "wörld"]
    talks = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": a}] for i, a in enumerate(answers)]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    mixture = Mixture([Source(str(path), kind="chat")])
    stream = open_stream(mixture, length=50, tokenizer=with_template(tiny_tokenizer, MARKED))
    return collate([stream[i] for i in range(len(stream))])


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(batch.inputs, cu_seqlens=batch.cu_seqlens).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-100)


def train(adapted: Adapted, batch: Batch, steps: int = 12) -> list[float]:
    optimizer = adamw(adapted.model)
    set_learning_rate(optimizer, 2e-2)
    losses = []
    for _ in range(steps):
        loss = loss_of(adapted.model.train(), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("four_bits", [False, True])
def test_the_loss_falls_and_every_projection_has_moved(four_bits: bool, checkpoint: str, batch: Batch) -> None:
    if four_bits:
        pytest.importorskip("bitsandbytes")
    adapted = start(checkpoint, Adapter(rank=4, alpha=8, four_bits=four_bits), dtype=torch.float32)
    assert set(adapted.report.adapted) == PROJECTIONS
    assert all(len(names) == 2 for names in adapted.report.adapted.values())
    assert adapted.report.total == start(checkpoint, Adapter(rank=4)).report.total
    frozen = {n: p.detach().clone() for n, p in adapted.model.named_parameters() if not p.requires_grad}
    losses = train(adapted, batch)
    assert losses[-1] < losses[0] - 0.5
    for name, parameter in adapted.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
        else:
            assert parameter.dtype == torch.float32
            assert parameter.abs().max() > 0, name


def test_saved_and_merged_adapters_are_the_trained_ones(checkpoint: str, batch: Batch, tmp_path: Path) -> None:
    adapted = start(checkpoint, Adapter(rank=4, targets=["x_proj", "out_proj"]))
    assert set(adapted.report.adapted) == {"out_proj", "x_proj"}
    train(adapted, batch, 3)
    adapted.save(str(tmp_path / "adapter"))
    assert len({path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}) == 1
    with torch.no_grad():
        expected = adapted.model.eval()(batch.inputs, cu_seqlens=batch.cu_seqlens).logits
        again, report = load_adapter(load(checkpoint), tmp_path / "adapter")
        assert isinstance(again, PeftModel)
        assert report.adapted.keys() == adapted.report.adapted.keys()
        found = again(input_ids=batch.inputs, cu_seqlens=batch.cu_seqlens).logits
        assert relative_error(found, expected) <= FLOAT32
        merged = adapted.merged()
        merged.save_pretrained(tmp_path / "merged")
        assert (
            relative_error(load(tmp_path / "merged")(batch.inputs, cu_seqlens=batch.cu_seqlens).logits, expected)
            <= FLOAT32
        )


def test_what_cannot_be_adapted_is_refused(checkpoint: str, tmp_path: Path) -> None:
    from mambalm.models.loading import convert

    with pytest.raises(ValueError, match="target 'qkv_proj' matches no module"):
        start(checkpoint, Adapter(targets=["qkv_proj"]))
    pytest.importorskip("bitsandbytes")
    convert(checkpoint, tmp_path / "other", "mamba_ssm")
    with pytest.raises(CheckpointError, match=r"in mamba_ssm's format.*mambalm convert"):
        start(str(tmp_path / "other"), Adapter(four_bits=True))
    four = start(checkpoint, Adapter(four_bits=True))
    with pytest.raises(ValueError, match="not merged: save them"):
        four.merged()
