"""Tokenising a corpus: units of work on parallel processes, resumed where a killed run stopped, verified."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mambalm.data import chat
from mambalm.data.inputs import Piece, Reading, plan
from mambalm.data.shards import (
    STAGING,
    encode_texts,
    note,
    noted,
    verify,
    write_shard,
    write_whole,
)
from mambalm.data.token_files import METADATA, Metadata, Shard, TokenFileError, companions_checksum, token_dtype
from mambalm.data.tokenizer import load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAN = "plan.json"


@dataclass(frozen=True)
class Tokenization:
    """One corpus to tokenise.

    Attributes:
        inputs: files, folders or data sets of the Hub.
        folder: where the token files go.
        tokenizer: a folder or a name of the Hub.
        reading: which field, and what happens to what cannot be read.
        chat: the documents are conversations, for which the tokenizer's template is used.
        pattern: of the files in folders.
        unit_bytes: input of one shard.
    """

    inputs: tuple[str, ...]
    folder: Path
    tokenizer: str
    reading: Reading
    chat: bool = False
    pattern: str | None = None
    unit_bytes: int = 64 << 20

    def settings(self) -> dict[str, Any]:
        """What the result depends on, for tokens.json and to recognise a run that is to be resumed."""
        reading = {name: getattr(self.reading, name) for name in ("text_field", "skip_bad", "config", "split", "lines")}
        return {
            "inputs": list(self.inputs),
            "chat": self.chat,
            "pattern": self.pattern,
            "unit_bytes": self.unit_bytes,
            **reading,
        }


@dataclass(frozen=True)
class Done:
    """One finished unit: its shard, and what was passed over in it."""

    shard: Shard
    size: int
    skipped: int = 0
    empty: int = 0
    first_skipped: str = ""


@dataclass
class Outcome:
    """What `tokenize` did: the metadata, and the sums over the units of this run."""

    metadata: Metadata
    text_bytes: int = 0
    skipped: int = 0
    empty: int = 0
    first_skipped: str = ""


def tokenize(
    task: Tokenization, *, workers: int, on_progress: Callable[[int, int, int], None] | None = None
) -> Outcome:
    """Tokenise a corpus, or go on with one that was begun; a folder that is complete is verified.

    Args:
        task: what to do. The result does not depend on the number of workers.
        workers: processes.
        on_progress: told bytes of input that are done, all bytes, and tokens written.

    Raises:
        InputError: an input cannot be read.
        TokenFileError: the folder was begun with other inputs or settings, or holds something else.

    After an error before the first shard is complete nothing is left of the folder.
    """
    tokenizer = load_tokenizer(task.tokenizer)
    if (task.folder / METADATA).exists():
        metadata = Metadata.read(task.folder)
        if metadata.settings != task.settings() or metadata.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
            raise TokenFileError(f"{task.folder} holds other token files, complete: write to another folder")
        return Outcome(verify(task.folder))
    _check(task, tokenizer)
    units = plan(task.inputs, task.reading, unit_bytes=task.unit_bytes, pattern=task.pattern)
    made = [folder for folder in (task.folder, *task.folder.parents) if not folder.exists()]
    _begin(task, tokenizer, units)
    try:
        return _go_on(task, tokenizer, units, workers, on_progress)
    except Exception:
        if not any(shard.documents for shard in noted(task.folder).values()):
            _remove(task.folder, made)
        raise


def _go_on(
    task: Tokenization,
    tokenizer: PreTrainedTokenizerBase,
    units: list[list[Piece]],
    workers: int,
    on_progress: Callable[[int, int, int], None] | None,
) -> Outcome:
    """Write the shards that are not there yet, and then the metadata."""
    finished = noted(task.folder)
    left = [number for number in range(len(units)) if _name(number) not in finished]
    sizes = [sum(piece.size for piece in unit) for unit in units]
    done, tokens = sum(sizes) - sum(sizes[n] for n in left), sum(shard.tokens for shard in finished.values())
    outcome = Outcome(_empty(task, tokenizer))
    for unit in _run(task, [(number, units[number]) for number in left], workers):
        done, tokens = done + unit.size, tokens + unit.shard.tokens
        outcome.text_bytes += unit.shard.text_bytes
        outcome.skipped, outcome.empty = outcome.skipped + unit.skipped, outcome.empty + unit.empty
        outcome.first_skipped = outcome.first_skipped or unit.first_skipped
        if on_progress is not None:
            on_progress(done, sum(sizes), tokens)
    outcome.metadata = _finish(task.folder, outcome.metadata)
    return outcome


def _remove(folder: Path, made: list[Path]) -> None:
    """Undo `_begin`: remove what this library writes into a folder, and the folders that were made for it."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    for path in folder.glob("*.ds*"):
        path.unlink()
    with contextlib.suppress(OSError):  # somebody put something else there
        for path in made:
            path.rmdir()


def collect(folder: Path, tokenizer_name: str) -> Metadata:
    """Write tokens.json for the shards that a cluster's tasks wrote with `WriteTokens`, or datatrove's own steps did.

    Raises:
        TokenFileError: there is no .ds file, or one is damaged or has tokens outside of the vocabulary.
    """
    tokenizer = load_tokenizer(tokenizer_name)
    names = sorted(path.name for path in folder.glob("*.ds"))
    if not names:
        raise TokenFileError(f"{folder} holds no .ds file: tokenise into it first")
    known = noted(folder)
    # All before the first is noted: another tokenizer's counts would otherwise stay.
    described = [_described(folder / name, tokenizer) for name in names if name not in known]
    (folder / STAGING).mkdir(exist_ok=True)
    for shard in described:
        note(folder, shard)
    empty = Metadata(
        len(tokenizer),
        tokenizer_name,
        tokenizer_fingerprint(tokenizer),
        tokenizer.eos_token_id,
        (),
        {"collected": True},
    )
    return _finish(folder, empty)


def _check(task: Tokenization, tokenizer: PreTrainedTokenizerBase) -> None:
    if task.chat:
        chat.require_template(tokenizer)
    elif tokenizer.eos_token_id is None:
        raise TokenFileError(f"{task.tokenizer} has no end-of-text token to stand between documents: set its eos_token")


def _empty(task: Tokenization, tokenizer: PreTrainedTokenizerBase) -> Metadata:
    end = None if task.chat else tokenizer.eos_token_id
    return Metadata(len(tokenizer), task.tokenizer, tokenizer_fingerprint(tokenizer), end, (), task.settings())


def _begin(task: Tokenization, tokenizer: PreTrainedTokenizerBase, units: list[list[Piece]]) -> None:
    """Note the plan, or compare it with the one of the run that is resumed."""
    times = {piece.path: _stamp(piece.path) for unit in units for piece in unit}
    what = {
        "settings": task.settings(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "files": times,
        "units": [[asdict(piece) for piece in unit] for unit in units],
    }
    path = task.folder / STAGING / _PLAN
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in what if before.get(name) != json.loads(json.dumps(what[name]))]
        if changed:
            raise TokenFileError(
                f"{task.folder} was begun with other {' and '.join(changed)}: give the same inputs and options "
                "again, or remove it"
            )
        return
    if task.folder.exists() and any(task.folder.iterdir()):
        raise TokenFileError(f"{task.folder} is not empty, and nothing that can be resumed: write to another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(what))


def _stamp(path: str) -> list[int]:
    file = Path(path)
    return [file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else []


def _run(task: Tokenization, units: Sequence[tuple[int, list[Piece]]], workers: int) -> Iterator[Done]:
    if workers == 1:
        _prepared["tokenizer"] = load_tokenizer(task.tokenizer)
        with _one_thread():
            for number, unit in units:
                yield _do(task, number, unit)
        return
    # Spawned, since a forked child of a process with threads may hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _prepare_worker, (task.tokenizer,))
    try:
        waiting: set[Future[Done]] = {pool.submit(_do, task, number, unit) for number, unit in units}
        while waiting:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_prepared: dict[str, PreTrainedTokenizerBase] = {}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Within, tokenizers keeps to one thread: a worker is a core."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _prepare_worker(tokenizer: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C is for the parent, which lets the shards in progress be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _prepared["tokenizer"] = load_tokenizer(tokenizer)


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(task: Tokenization, number: int, unit: list[Piece]) -> Done:
    reading, tokenizer = replace(task.reading), _prepared["tokenizer"]
    if task.chat:
        batches = chat.encode_chats(tokenizer, reading, unit)
    else:
        batches = encode_texts(tokenizer, reading.documents(unit), tokenizer.eos_token_id)
    shard = write_shard(task.folder, _name(number), batches, len(tokenizer))
    size = sum(piece.size for piece in unit)
    return Done(shard, size, reading.skipped, reading.empty, reading.first_skipped)


def _name(number: int) -> str:
    return f"{number:06d}.ds"


def _finish(folder: Path, metadata: Metadata) -> Metadata:
    shards = tuple(shard for shard in noted(folder).values() if shard.documents)
    if not shards:
        raise TokenFileError(f"the inputs of {folder} hold no document with text: check --field and --pattern")
    write_whole(folder / METADATA, replace(metadata, shards=shards).to_json())
    try:
        verified = verify(folder)
    except TokenFileError:
        (folder / METADATA).unlink()
        raise
    shutil.rmtree(folder / STAGING)
    return verified


def _described(path: Path, tokenizer: PreTrainedTokenizerBase) -> Shard:
    """What is to be noted of a token file of datatrove's; the text's size is that of the decoded tokens."""
    dtype, index = token_dtype(len(tokenizer)), path.with_name(f"{path.name}.index")
    if not index.exists():
        raise TokenFileError(f"{index} is missing: let datatrove write it (save_index=True)")
    ends = np.fromfile(index, "<u8").astype(np.int64)
    tokens = np.fromfile(path, dtype)
    highest = int(tokens.max(initial=0))
    if highest >= len(tokenizer) or (len(ends) and ends[-1] != len(tokens)):
        raise TokenFileError(
            f"{path} was not written with a vocabulary of {len(tokenizer):,}: name its own --tokenizer"
        )
    documents = np.split(tokens, ends[:-1])
    texts = tokenizer.batch_decode([document.tolist() for document in documents], skip_special_tokens=True)
    text_bytes = sum(len(text.encode()) for text in texts)
    checksums = hashlib.sha256(tokens.tobytes()).hexdigest(), companions_checksum(path)
    return Shard(path.name, len(ends), len(tokens), text_bytes, highest, *checksums)
