"""Tokenising: exact tokens whatever the workers, resumed after a kill, verified, read by datatrove."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mambalm.data import tokenization
from mambalm.data.cluster import WriteTokens
from mambalm.data.corpus import Corpus
from mambalm.data.inputs import InputError, Reading
from mambalm.data.shards import verify
from mambalm.data.token_files import Metadata, TokenFileError
from mambalm.data.tokenization import Tokenization, collect, tokenize

pytest.importorskip("datatrove")
pytest.importorskip("orjson")

TEXTS = [f"def quick_{i}(numbers): return {'é' * (i % 5)}\n" * (i % 4 + 1) for i in range(150)] + ["a <end> b"]


@pytest.fixture(scope="module")
def tokenizer_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def task(tmp_path: Path, tokenizer_folder: str) -> Tokenization:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return Tokenization((str(path),), tmp_path / "out", tokenizer_folder, Reading(), unit_bytes=3000)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_hold_exactly_the_tokens(task: Tokenization, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    outcome = tokenize(task, workers=1)
    metadata = verify(task.folder)
    assert metadata == outcome.metadata == Metadata.read(task.folder)
    assert len(metadata.shards) > 3
    assert (metadata.documents, metadata.text_bytes) == (len(TEXTS), sum(len(t.encode()) for t in TEXTS))
    corpus = Corpus.open(task.folder)
    passage = corpus.read(0, corpus.tokens)
    documents = np.split(passage.tokens, passage.starts[1:])
    for document, text in zip(documents, TEXTS, strict=True):
        # <end> in the text is text; the one behind it ends the document.
        assert document[-1] == tiny_tokenizer.eos_token_id
        assert 0 not in document[:-1]
        assert tiny_tokenizer.decode(document[:-1].tolist()) == text


@pytest.mark.slow
def test_workers_change_nothing_and_a_complete_folder_is_verified(task: Tokenization) -> None:
    tokenize(task, workers=1)
    other = dataclasses.replace(task, folder=task.folder.with_name("two"))
    seen = []
    tokenize(other, workers=2, on_progress=lambda done, size, tokens: seen.append((done, size, tokens)))
    assert files(task.folder) == files(other.folder)
    assert seen[-1] == (seen[-1][1], Path(task.inputs[0]).stat().st_size, Metadata.read(task.folder).tokens)
    before = {path: path.stat().st_mtime_ns for path in task.folder.iterdir()}
    tokenize(task, workers=1)
    assert before == {path: path.stat().st_mtime_ns for path in task.folder.iterdir()}
    with pytest.raises(TokenFileError, match="holds other token files, complete"):
        tokenize(dataclasses.replace(task, unit_bytes=4000), workers=1)


def test_a_killed_run_goes_on_behind_its_last_shard(
    task: Tokenization, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str
) -> None:
    whole = dataclasses.replace(task, folder=task.folder.with_name("whole"))
    tokenize(whole, workers=1)
    do, made = tokenization._do, []

    def dying(task: Tokenization, number: int, unit: object) -> object:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        return do(task, number, unit)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenization, "_do", dying)
    with pytest.raises(KeyboardInterrupt):
        tokenize(task, workers=1)
    assert not (task.folder / "tokens.json").exists()
    assert sorted(path.name for path in task.folder.glob("*.ds")) == ["000000.ds", "000001.ds"]
    with pytest.raises(TokenFileError, match="begun with other settings"):
        tokenize(dataclasses.replace(task, reading=Reading(skip_bad=True)), workers=1)
    # What a kill left of the third is overwritten.
    (task.folder / ".partial" / "000002.ds").write_bytes(b"half")
    made.clear()
    monkeypatch.setattr(tokenization, "_do", lambda *args: made.append(args[1]) or do(*args))
    tokenize(task, workers=1)
    assert made == list(range(2, len(Metadata.read(whole.folder).shards)))
    assert files(task.folder) == files(whole.folder)


@pytest.mark.slow
def test_kill_minus_nine(task: Tokenization, tokenizer_folder: str) -> None:
    path = Path(task.inputs[0])
    path.write_text(path.read_text() * 60)
    command = [sys.executable, "-m", "mambalm", "tokenize", str(path), "-o", str(task.folder), "--tokenizer"]
    command += [tokenizer_folder, "--shard-megabytes", "1", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENISING": str(task.folder)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not list(task.folder.glob("*.ds")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (task.folder / "tokens.json").exists()
    # The workers end too, and write nothing behind the back of the next run.
    end = time.monotonic() + 20
    while (left := workers_on(str(task.folder))) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert verify(task.folder).documents == 60 * len(TEXTS)


def workers_on(folder: str) -> list[str]:
    """Spawned processes that were started for this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes().decode(errors="replace")
            environment = (path / "environ").read_bytes().decode(errors="replace")
            if "spawn_main" in command and f"TOKENISING={folder}" in environment:
                found.append(path.name)
    return found


def test_changed_inputs_are_noticed(task: Tokenization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_do", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokenize(task, workers=1)
    os.utime(task.inputs[0], (1, 1))
    with pytest.raises(TokenFileError, match="begun with other files"):
        tokenize(task, workers=1)


def test_nothing_is_left_half_written(task: Tokenization) -> None:
    path = Path(task.inputs[0])
    path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"a.jsonl, byte [\d,]+: byte 0xff is not UTF-8"):
        tokenize(task, workers=1)
    assert not (task.folder / "tokens.json").exists()
    with pytest.raises(TokenFileError, match=r"has no tokens\.json: finish"):
        Corpus.open(task.folder)
    path.write_bytes(b'{"text": ""}\n')
    empty = task.folder.with_name("in") / "empty"
    with pytest.raises(TokenFileError, match="no document with text"):
        tokenize(dataclasses.replace(task, folder=empty), workers=1)
    assert not empty.parent.exists()
    (task.folder.with_name("other")).mkdir()
    (task.folder.with_name("other") / "mine.txt").write_text("x")
    with pytest.raises(TokenFileError, match="is not empty"):
        tokenize(dataclasses.replace(task, folder=task.folder.with_name("other")), workers=1)


@pytest.mark.parametrize("broken", [b'{"text": "\xff"}\n', b'{"other": 1}\n'])
def test_a_refused_input_leaves_nothing(broken: bytes, task: Tokenization) -> None:
    Path(task.inputs[0]).write_bytes(broken)
    with pytest.raises(InputError):
        tokenize(task, workers=1)
    assert not task.folder.exists()
    task.folder.mkdir()
    with pytest.raises(InputError):
        tokenize(task, workers=1)
    assert list(task.folder.iterdir()) == []


def test_damage_between_shards_and_metadata_leaves_no_metadata(task: Tokenization, tokenizer_folder: str) -> None:
    tokenize(task, workers=1)
    (task.folder / "tokens.json").unlink()
    flip(task.folder / "000001.ds.index", 6)
    with pytest.raises(TokenFileError, match="goes backwards"):
        collect(task.folder, tokenizer_folder)
    assert not (task.folder / "tokens.json").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "000001.ds", 0, 1), "000001.ds differs from its checksum"),
        (lambda folder: flip(folder / "000001.ds", 1), "000001.ds holds token 6.*has 300"),
        (lambda folder: flip(folder / "000001.ds.index", 6), "000001.ds.index goes backwards"),
        (lambda folder: flip(folder / "000001.ds.hash", 3), "000001.ds.index, 000001.ds.hash, .* is damaged"),
        (lambda folder: (folder / "000001.ds").unlink(), "000001.ds is missing"),
    ],
)
def test_verify_finds_damage(damage: object, message: str, task: Tokenization) -> None:
    tokenize(task, workers=1)
    assert callable(damage)
    damage(task.folder)
    with pytest.raises(TokenFileError, match=message):
        verify(task.folder)


def flip(path: Path, byte: int, bits: int = 255) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= bits
    path.write_bytes(data)


def test_datatrove_reads_the_files(task: Tokenization) -> None:
    dataset = pytest.importorskip("datatrove.utils.dataset")
    tokenize(task, workers=1)
    theirs = dataset.DatatroveFolderDataset(str(task.folder), 20, token_size=2, return_positions=True)
    shard = Metadata.read(task.folder).shards[0]
    corpus = Corpus.open(task.folder)
    assert len(theirs) == sum(shard.tokens // 21 for shard in Metadata.read(task.folder).shards)
    for i in range(shard.tokens // 21):
        passage = corpus.read(21 * i, 21)
        assert theirs[i]["input_ids"].tolist() == passage.tokens.tolist()
        assert set(np.flatnonzero(theirs[i]["positions"] == 0)) >= set(passage.starts)


def test_a_cluster_writes_the_same_tokens(task: Tokenization, tokenizer_folder: str, tmp_path: Path) -> None:
    executor = pytest.importorskip("datatrove.executor")
    readers = pytest.importorskip("datatrove.pipeline.readers")
    tokenize(task, workers=1)
    steps = [
        readers.JsonlReader(str(tmp_path), glob_pattern="*.jsonl"),
        WriteTokens(str(tmp_path / "c"), tokenizer_folder),
    ]
    executor.LocalPipelineExecutor(steps, tasks=1, logging_dir=str(tmp_path / "logs")).run()
    metadata = collect(tmp_path / "c", tokenizer_folder)
    assert metadata.text_bytes == Metadata.read(task.folder).text_bytes
    one, two = Corpus.open(task.folder), Corpus.open(tmp_path / "c")
    assert np.array_equal(one.read(0, one.tokens).tokens, two.read(0, two.tokens).tokens)
    # Without what the step noted, as after datatrove's own writer.
    (tmp_path / "c" / "tokens.json").unlink()
    again = collect(tmp_path / "c", tokenizer_folder)
    assert (again.shards[0].sha256, again.text_bytes) == (metadata.shards[0].sha256, metadata.text_bytes)


def test_a_smaller_vocabulary_is_refused(task: Tokenization, tmp_path: Path) -> None:
    from mambalm.data.tokenizer import train_tokenizer

    tokenize(task, workers=1)
    small = train_tokenizer(["abc"], 257)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(TokenFileError, match="holds other token files"):
        tokenize(dataclasses.replace(task, tokenizer=str(tmp_path / "small")), workers=1)
    (task.folder / "tokens.json").unlink()
    with pytest.raises(TokenFileError, match="not written with a vocabulary of 257"):
        collect(task.folder, str(tmp_path / "small"))
    assert not (task.folder / ".partial").exists()
