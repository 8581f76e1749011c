"""`mambalm.load` and `convert`: what they take, and what they refuse with the tensor's name and the remedy."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor

import mambalm
from mambalm.models import loading
from mambalm.models.formats import CheckpointError
from mambalm.models.loading import convert
from tests.models.formats.checkpoints import LAYOUTS, assert_same, logits, original_tensors, write_original


def checkpoint(folder: Path, layout: str = "mamba", **changes: Tensor | None) -> Path:
    """A checkpoint in mamba_ssm's format, some tensors replaced or (None) left out."""
    tensors = original_tensors(LAYOUTS[layout].model())
    for name, value in changes.items():
        tensors[name] = value
    present = {name: value for name, value in tensors.items() if value is not None}
    return write_original(folder, LAYOUTS[layout].raw, present)


def test_the_dtype_is_the_files_or_the_one_asked_for(tmp_path: Path) -> None:
    name = "backbone.layers.0.mixer.in_proj.weight"
    source = checkpoint(tmp_path / "a", **{name: torch.randn(128, 32).bfloat16()})
    kept = mambalm.load(source).state_dict()
    assert {key for key, tensor in kept.items() if tensor.dtype == torch.bfloat16} == {name}
    for dtype in (torch.float16, "float16"):
        model = mambalm.load(source, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
        assert model.config.dtype == torch.float16
    cast = mambalm.load(convert(source, tmp_path / "b", dtype="bfloat16"))
    assert_same(cast.state_dict(), {key: tensor.bfloat16() for key, tensor in kept.items()})
    for wrong in ("int8", torch.int8, 8, "float8_e4m3fn", "matmul"):
        with pytest.raises(ValueError, match=r"none that models compute in.*bfloat16"):
            mambalm.load(source, dtype=wrong)


def test_a_loaded_model_trains_and_leaves_the_file_alone(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    before = (source / "pytorch_model.bin").read_bytes()
    model = mambalm.load(source)
    tokens = torch.tensor([[1, 2, 3]])
    model(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(logits(model), logits(mambalm.load(source)))
    assert (source / "pytorch_model.bin").read_bytes() == before


def test_a_loaded_model_can_be_saved_where_it_came_from(tmp_path: Path) -> None:
    model = mambalm.load(convert(checkpoint(tmp_path / "a"), tmp_path / "b"))
    with torch.no_grad():
        model.backbone.norm_f.weight.mul_(2)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "b")
    assert len({path.stat().st_mode for path in (tmp_path / "b").iterdir()}) == 1, "others can read all or nothing"
    assert_same(model.state_dict(), expected)
    assert_same(mambalm.load(tmp_path / "b").state_dict(), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone.layers.1.mixer.D": None}, r"lacks backbone\.layers\.1\.mixer\.D \(64,\)"),
        ({"backbone.layers.3.norm.weight": torch.ones(32)}, r"has backbone\.layers\.3\.norm\.weight \(32,\) in excess"),
        (
            {"backbone.layers.0.mixer.A_log": torch.ones(64, 8)},
            r"layers\.0\.mixer\.A_log has shape \(64, 8\) in the file and \(64, 16\) by the configuration.*use the one",
        ),
        (
            {"backbone.embedding.weight": torch.ones(40, 32), "lm_head.weight": None},
            r"embeddings\.weight has shape \(40, 32\) in the file and \(48, 32\).*set vocab_size to 40",
        ),
        ({"backbone.norm_f.weight": torch.ones(32, dtype=torch.int8)}, r"norm_f\.weight is torch\.int8.*quantised"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes: dict, message: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", **changes)
    with pytest.raises(CheckpointError, match=message):
        mambalm.load(source)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_long_lists_are_cut(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    (source / "config.json").write_text(json.dumps(LAYOUTS["mamba"].raw | {"n_layer": 30}))
    with pytest.raises(CheckpointError, match="and 265 more for a mamba model"):
        mambalm.load(source)


@pytest.mark.parametrize("layout", ["mamba", "mamba2attn"])
def test_a_billion_layers_are_refused_before_they_are_built(layout: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a", layout)
    converted = convert(source, tmp_path / "b")
    for folder, name in ((source, "n_layer"), (converted, "num_hidden_layers")):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: 10**9}))
        with pytest.raises(CheckpointError, match=r"has 1,000,000,000 layers, the weights have \d\d tensors"):
            mambalm.load(folder)


def test_unknown_formats_are_told_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no known format.*params\.json.*holds nothing"):
        mambalm.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds config\.json"):
        mambalm.load(tmp_path)
    with pytest.raises(ValueError, match=r"'gguf'.*transformers or mamba_ssm"):
        convert(tmp_path, tmp_path / "out", "gguf")


def test_files_of_a_folder_stand_for_it(tmp_path: Path) -> None:
    model = mambalm.load(checkpoint(tmp_path))
    for name in ("config.json", "pytorch_model.bin"):
        assert_same(mambalm.load(tmp_path / name).state_dict(), model.state_dict())


def test_the_tokenizer_goes_with_the_weights(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a")
    names = ("tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja")
    for name in names:
        (source / name).write_text(name)
    (source / "training_args.bin").write_text("not the model's")
    for format in ("transformers", "mamba_ssm"):
        written = convert(source, tmp_path / format, format)
        assert all((written / name).read_text() == name for name in names)
        assert not (written / "training_args.bin").exists()


def test_a_checkpoint_can_be_converted_in_place(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a")
    expected = mambalm.load(source).state_dict()
    with pytest.raises(CheckpointError, match="not empty"):
        convert(source, source)
    convert(source, source, overwrite=True)
    modes = {path.stat().st_mode for path in source.iterdir()}
    assert (source / "model.safetensors").exists()
    assert len(modes) == 1, "every file is as readable as the others"
    assert_same(mambalm.load(source).state_dict(), expected)


def test_a_hub_repository_is_downloaded_once_per_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, cache = checkpoint(tmp_path / "hub"), tmp_path / "cache"
    shutil.copy(hub / "pytorch_model.bin", hub / "pytorch_model.pt")
    (hub / "tokenizer.json").write_text("{}")
    cache.mkdir()

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        assert repo_id == "state-spaces/mamba-tiny"
        for path in hub.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    assert_same(mambalm.load("state-spaces/mamba-tiny").state_dict(), mambalm.load(hub).state_dict())
    assert {path.name for path in cache.iterdir()} == {"config.json", "pytorch_model.bin", "tokenizer.json"}


def test_without_a_network_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"state-spaces/mamba-none is no folder here.*offline, pass the path"):
        mambalm.load("state-spaces/mamba-none")
    with pytest.raises(CheckpointError, match=r"/nowhere/model/x does not exist"):
        mambalm.load("/nowhere/model/x")
