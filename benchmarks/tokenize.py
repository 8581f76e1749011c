"""Megabytes of text tokenised per second, and per second of a core: `python -m benchmarks.tokenize [--megabytes 64]`.

The corpus is the Python sources beside this Python, each once (a tokenizer remembers words, so that text read twice is
cheaper); the tokenizer is a byte-level BPE of 32,768 tokens trained on a part of them. What is timed is all that
`mambalm tokenize` does behind loading the tokenizer: reading, encoding, writing, verifying.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.__main__ import RESULTS
from benchmarks.cpu import folder_of, processor
from mambalm.data.documents import read_documents
from mambalm.data.inputs import Reading
from mambalm.data.mixture import Mixture, Source, open_stream
from mambalm.data.tokenization import Tokenization, tokenize
from mambalm.data.tokenizer import train_tokenizer

VOCABULARY = 32_768


def main() -> None:
    """Tokenise on one and on two processes, read what they wrote, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenize", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    texts = list(sources(options.megabytes * 10**6))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(texts[:: max(1, len(texts) // 500)], VOCABULARY).save_pretrained(folder / "tokenizer")
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        for workers in options.workers:
            rows.append(measured(folder, workers))
            print(json.dumps(rows[-1]), flush=True)
        reading = {
            packing: read(folder / f"out{options.workers[0]}", packing) for packing in ("concatenated", "documents")
        }
    print(json.dumps(reading), flush=True)
    header = {"device": processor(), "tokenizers": version("tokenizers"), "vocabulary": VOCABULARY}
    target = options.output / folder_of(processor()) / "tokenize.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**header, "runs": rows, "read_tokens_per_second": reading}, indent=1) + "\n")


def sources(nbytes: int) -> Iterator[str]:
    """Different Python files of about so many bytes in all, in an order that looks random."""
    documents = read_documents(Path(sysconfig.get_paths()["purelib"])) + read_documents(
        Path(sysconfig.get_paths()["stdlib"])
    )
    seen: set[int] = set()
    for i in np.random.default_rng(0).permutation(len(documents)):
        text = documents[i].text
        if hash(text) not in seen:
            seen.add(hash(text))
            nbytes -= len(text.encode())
            yield text
        if nbytes <= 0:
            return


def measured(folder: Path, workers: int) -> dict[str, Any]:
    """One run, in a new folder; the time of starting processes is in it."""
    task = Tokenization(
        (str(folder / "a.jsonl"),), folder / f"out{workers}", str(folder / "tokenizer"), Reading(), unit_bytes=8 << 20
    )
    began, used = time.perf_counter(), _cpu_seconds()
    metadata = tokenize(task, workers=workers).metadata
    seconds = time.perf_counter() - began
    used = _cpu_seconds() - used
    megabytes = metadata.text_bytes / 1e6
    return {
        "workers": workers,
        "text_bytes": metadata.text_bytes,
        "tokens": metadata.tokens,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(used, 2),
        "MB_per_second": round(megabytes / seconds, 2),
        "MB_per_cpu_second": round(megabytes / used, 2),
    }


def read(folder: Path, packing: Literal["concatenated", "documents"]) -> int:
    """Tokens per second of samples of 2048, in the order of a run, by one process."""
    stream = open_stream(Mixture([Source(str(folder))], packing, held_out=0.01), length=2048, tokenizer=None)
    began = time.perf_counter()
    for index in range(2000):
        stream[index]
    return round(2000 * stream.length / (time.perf_counter() - began))


def _cpu_seconds() -> float:
    """Of this process, its threads and the processes that it has waited for."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
