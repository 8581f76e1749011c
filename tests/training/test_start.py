"""Runs that begin from a checkpoint: of every format, with the embeddings of another tokenizer, forked into decays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import MambaConfig

import mambalm
from mambalm.data.tokenizer import load_tokenizer, train_tokenizer
from mambalm.models import MambaForCausalLM
from mambalm.models.loading import convert
from mambalm.training.checkpoint import Checkpoints
from mambalm.training.held_out import sum_loss
from mambalm.training.model import build_model, size_of
from mambalm.training.recipe_files import dump
from tests.models.formats import test_mistral, test_openlm
from tests.training.runs import VOCABULARY, finish, recipe, trainer, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def plain(vocabulary: int = VOCABULARY, tied: bool = True) -> MambaForCausalLM:
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**sizes, vocab_size=vocabulary, tie_word_embeddings=tied))


def written(folder: Path, format: str) -> Path:
    """A checkpoint in a format, with as many tokens as the runs' tokenizer has, or more."""
    if format == "openlm":
        model = test_openlm.layer_norm_model()
        model.resize_token_embeddings(VOCABULARY)
        test_openlm.write(folder, model)
        path = folder / "mamba_tiny.json"
        path.write_text(path.read_text().replace('"vocab_size": 48', f'"vocab_size": {VOCABULARY}'))
    elif format == "mistral":
        model = test_mistral.codestral()
        model.resize_token_embeddings(VOCABULARY)
        test_mistral.write(folder, model, test_mistral.PARAMS | {"vocab_size": VOCABULARY})
    elif format == "mamba_ssm":
        plain().save_pretrained(folder.with_name("plain"))
        convert(folder.with_name("plain"), folder, "mamba_ssm")
    else:
        plain().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("format", ["transformers", "mamba_ssm", "openlm", "mistral"])
def test_a_run_starts_from_every_format(format: str, data: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "source", format)
    before = {name: value.clone() for name, value in mambalm.load(source).state_dict().items()}
    files = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    made = trainer(recipe(data, {"model": {"start": str(source)}}), tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in made.network.state_dict().items())
    reports = [made.advance() for _ in range(2)]
    model = mambalm.load(source, dtype=torch.float32)
    batches = trainer(recipe(data, {"model": {"start": str(source)}}), tmp_path / "again").reader.read
    position = type(made.position)()
    count = int(reports[0].values["batch"])
    sums = [(sum_loss(model, b, torch.device("cpu")).item(), (b.targets >= 0).sum()) for b in batches(position, count)]
    expected = sum(loss for loss, _ in sums) / sum(int(size) for _, size in sums)
    assert reports[0].values["loss"] == pytest.approx(expected, rel=1e-5)
    # Every parameter is trained, and the files that they were pages of are as they were.
    unmoved = [name for name, value in made.network.state_dict().items() if torch.equal(value, before[name])]
    assert unmoved == []
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("tied", [True, False])
def test_new_embeddings_are_drawn_and_the_rest_is_kept(tied: bool, data: Path, tmp_path: Path) -> None:
    old = plain(100, tied)
    old.save_pretrained(tmp_path / "source")
    section = {"start": str(tmp_path / "source")}
    with pytest.raises(ValueError, match=r"has 272 tokens, the model's vocabulary 100.*model\.new_embeddings=true"):
        trainer(recipe(data, {"model": section}), tmp_path / "run")
    made = recipe(data, {"model": section | {"new_embeddings": True}})
    training = trainer(made, tmp_path / "run")
    found = training.network
    assert found.config.vocab_size == VOCABULARY
    drawn = {"backbone.embeddings.weight", "lm_head.weight"}
    for name, value in old.state_dict().items():
        if name not in drawn:
            assert torch.equal(found.state_dict()[name], value), name
    for name in drawn:
        weight = found.state_dict()[name]
        assert weight.shape == (VOCABULARY, 16)
        assert not torch.isin(weight[:100], old.state_dict()[name]).any()
        assert weight.std().item() == pytest.approx(old.config.initializer_range, rel=0.1)
    assert (found.lm_head.weight is found.backbone.embeddings.weight) is tied
    assert size_of(made).parameters == sum(parameter.numel() for parameter in found.parameters())
    again = build_model(made, training.tokenizer)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in found.state_dict().items())
    losses = finish(training)
    assert losses[-1] < losses[0] - 0.1


def test_the_tokenizer_of_the_checkpoint(data: Path, tmp_path: Path) -> None:
    """One with more tokens goes on; one that numbers them otherwise is refused, unless embeddings are drawn."""
    old = plain(400)
    old.save_pretrained(tmp_path / "source")
    train_tokenizer(["return 1: count ", "else "], 270).save_pretrained(tmp_path / "source")
    made = recipe(data, {"model": {"start": str(tmp_path / "source")}})
    tokenizer = load_tokenizer(made.tokenizer)
    with pytest.raises(ValueError, match=r"has the token .* as number \d+, and the checkpoint .*source as \d+: take"):
        build_model(made, tokenizer)
    renewed = recipe(data, {"model": {"start": str(tmp_path / "source"), "new_embeddings": True}})
    assert build_model(renewed, tokenizer).config.vocab_size == VOCABULARY
    tokenizer.save_pretrained(tmp_path / "source")
    tokenizer.add_tokens(["<another>"])
    assert build_model(made, tokenizer).config.vocab_size == 400


def test_forks_before_the_decay_share_the_stable_phase(data: Path, tmp_path: Path) -> None:
    """One stable run, forked into decays of two lengths: each is what a run of its own would have been, bit for bit."""
    changes = {"stages": [{"name": "stable", "tokens": 1024, "context": 16, "batch": 4, "micro_batch": 4}]}
    stable = trainer(recipe(data, changes | {"schedule": {"kind": "constant", "peak": 1e-2}}), tmp_path / "stable")
    finish(stable, 8)
    stable.save()
    stable.checkpoints.wait()
    for tokens in (768, 1024):
        decayed = {
            "stages": [changes["stages"][0] | {"tokens": tokens}],
            "schedule": {"kind": "wsd", "peak": 1e-2, "floor": 1e-4, "decay": tokens - 512, "shape": "exponential"},
        }
        losses = finish(trainer(recipe(data, decayed), tmp_path / f"whole-{tokens}"))
        fork = decayed | {"fork": {"run": str(tmp_path / "stable"), "step": 8}}
        folder = tmp_path / f"fork-{tokens}"
        made = trainer(recipe(data, fork), folder)
        assert finish(made) == losses[8:]
        assert len(losses) == tokens // 64
        assert made.rates(0, tokens, 4) == pytest.approx(1e-4)
        assert Checkpoints(tmp_path / "stable" / "checkpoints").steps() == [8]
        assert yaml.safe_load(dump(made.recipe))["fork"]["step"] == 8
