"""The files: read through memory maps, refused with a reason when damaged, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mambalm
from mambalm.models.formats.io import CheckpointError, Source, read_tensors, save_tensors, write_torch, written_whole
from tests.models.formats.checkpoints import LAYOUTS, assert_same, original_tensors, write_original

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(400, dtype=torch.bfloat16)}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_tensors_are_mapped_not_copied(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    save_file(TENSORS, path) if suffix == ".safetensors" else torch.save(TENSORS, path)
    read = read_tensors([path])
    assert_same(read, TENSORS)
    if (maps := Path("/proc/self/maps")).exists():
        assert str(path) in maps.read_text()
    before = path.read_bytes()
    read["a"].add_(1)
    assert path.read_bytes() == before


def test_loading_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists() or "RssAnon" not in status.read_text():
        pytest.skip("the system does not tell anonymous memory apart")

    def anonymous() -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    raw = LAYOUTS["mamba"].raw | {"vocab_size": 300_000}
    tensors = original_tensors(LAYOUTS["mamba"].model())
    tensors["backbone.embedding.weight"] = torch.zeros(300_000, 32)
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    write_original(tmp_path, raw, tensors)
    del tensors
    before = anonymous()
    model = mambalm.load(tmp_path)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 38e6
    assert anonymous() - before < size / 4


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (5, "its header should end"),
        (40, "its header should end"),
        (-815, r"a \(shape \(2, 3\)\) should end"),
        (-3, r"b \(shape \(400,\)\) should end"),
    ],
)
def test_truncated_safetensors(keep: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"truncated.*{message}.*again"):
        read_tensors([path])


@pytest.mark.parametrize("keep", [0, 30, -100])
def test_truncated_torch_files(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x\.bin cannot be read.*again"):
        read_tensors([path])


def test_files_that_are_something_else(tmp_path: Path) -> None:
    text = tmp_path / "x.safetensors"
    text.write_bytes((8).to_bytes(8, "little") + b"no json!")
    with pytest.raises(CheckpointError, match="no valid safetensors"):
        read_tensors([text])
    for header in ("[1, 2]", '{"a": 5}', '{"a": {"dtype": "F32", "shape": [1]}}'):
        text.write_bytes(len(header).to_bytes(8, "little") + header.encode())
        with pytest.raises(CheckpointError, match="no valid safetensors"):
            read_tensors([text])
    old = tmp_path / "old.bin"
    torch.save(TENSORS, old, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"zip format.*save it again"):
        read_tensors([old])
    torch.save([TENSORS], old)
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        read_tensors([old])
    torch.save(TENSORS | {"step": 3}, old)
    with pytest.raises(CheckpointError, match="'step' is a int"):
        read_tensors([old])


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_bit_that_flipped_is_another_value_or_a_checkpoint_error(suffix: str, tmp_path: Path) -> None:
    path, tensors = tmp_path / f"x{suffix}", {"a": torch.arange(6.0).view(2, 3)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    whole = bytearray(path.read_bytes())
    for at in range(0, len(whole), 1 if suffix == ".safetensors" else 5):
        whole[at] ^= 1 << at % 7
        path.write_bytes(whole)
        whole[at] ^= 1 << at % 7
        with contextlib.suppress(CheckpointError):
            read_tensors([path])  # nothing else is raised


class Malicious:
    """What a pickle may do when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save(OrderedDict(TENSORS, x=Malicious(tmp_path / "ran")), tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"x\.bin is a pickle that runs code.*trust"):
        read_tensors([tmp_path / "x.bin"])
    assert not (tmp_path / "ran").exists()


def test_shards(tmp_path: Path) -> None:
    for number, name in enumerate(TENSORS, 1):
        save_file({name: TENSORS[name]}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    files = Source(tmp_path).files("model", ".safetensors")
    assert_same(read_tensors(files), TENSORS)
    with pytest.raises(CheckpointError, match="repeats 'a'"):
        read_tensors([*files, files[0]])
    index = {"weight_map": {"a": files[0].name, "b": "model-00003-of-00003.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors, which is not there"):
        Source(tmp_path).files("model", ".safetensors")
    for damaged in ("{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="has no weight_map of tensors to files"):
            Source(tmp_path).files("model", ".safetensors")
    for outside in ("../x.safetensors", "/x.safetensors", "deep/x.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(CheckpointError, match=f"names {outside}, which is no file of its folder"):
            Source(tmp_path).files("model", ".safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Source(tmp_path).files("model", ".safetensors")


def test_only_a_tensors_own_part_is_saved(tmp_path: Path) -> None:
    large = torch.zeros(100_000)
    write_torch(tmp_path / "x.bin", {"a": large[:10], "b": large[10:20]})
    assert (tmp_path / "x.bin").stat().st_size < 5000


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process grows over 2 KiB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path: Path) -> None:
    """safetensors and torch raise errors of their own."""
    tensors = {"a": torch.zeros(5000)}
    with pytest.raises(OSError, match=r"cannot write .*x\.safetensors"):
        save_tensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(OSError, match=r"cannot write .*x\.bin"):
        write_torch(tmp_path / "x.bin", tensors)
    with pytest.raises(OSError, match=r"cannot write .*model"):
        LAYOUTS["mamba"].model().save_pretrained(tmp_path / "model")


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    destination = tmp_path / "new" / "deep"
    with written_whole(destination) as folder:
        (folder / "x").write_text("1")
        assert not destination.exists()
    assert (destination / "x").read_text() == "1"
    with pytest.raises(CheckpointError, match=r"not empty.*--overwrite"), written_whole(destination):
        pass
    with written_whole(destination, overwrite=True) as folder:
        (folder / "y").write_text("2")
    assert [path.name for path in destination.iterdir()] == ["y"]
    assert [path.name for path in destination.parent.iterdir()] == ["deep"]
    with pytest.raises(CheckpointError, match="is a file"), written_whole(destination / "y"):
        pass


def interrupted(destination: Path) -> None:
    with written_whole(destination, overwrite=True) as folder:
        (folder / "x").write_text("2")
        raise KeyboardInterrupt


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "x").write_text("1")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "x").read_text() == "1"


def test_an_empty_folder_may_be_written_to(tmp_path: Path) -> None:
    with written_whole(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
    (tmp_path / "b").mkdir()
    with written_whole(tmp_path / "b") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "b" / "x").exists()


def test_a_link_stays_a_link_to_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    for text in "12":
        with written_whole(tmp_path / "link", overwrite=True) as folder:
            (folder / "x").write_text(text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "large" / "x").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "link"]
