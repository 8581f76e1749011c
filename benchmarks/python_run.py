"""A small Mamba beside a Transformer++ on Python sources: `python -m benchmarks.python_run [--tokens 45M]`.

Makes the corpus (the standard library and the installed packages of the running Python), the tokenizer and the token
files, trains both recipes through their stages on the GPU, and writes beside the runs `python.json`, with held-out bits
per byte of both and of xz, `python.png` with both curves, and the Mamba's export in shards. Interrupted, it goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.timing import provenance
from mambalm.data.corpus import Corpus
from mambalm.data.documents import Document, read_documents, standard_library
from mambalm.data.tokenizer import train_tokenizer
from mambalm.models.loading import load
from mambalm.training.curve import plot_runs
from mambalm.training.metrics import read_metrics
from mambalm.training.recipe import parse_count

RECIPES = ("mamba-28m-python", "transformerpp-28m-python")
VOCABULARY = 8192
LARGEST = 200_000  # bytes of a file; above are tables
TOKENIZER_BYTES = 12_000_000
HELD_OUT = 0.01


def corpus() -> list[Document]:
    """Every text once, in the order of a hash of the names."""
    documents = [*standard_library(), *read_documents(Path(sysconfig.get_paths()["purelib"]))]
    texts = {document.text: document for document in documents if document.nbytes <= LARGEST}
    return sorted(texts.values(), key=lambda document: hash_of(document.name))


def hash_of(name: str) -> bytes:
    """An order that is the same on every machine."""
    return hashlib.sha256(name.encode()).digest()


def prepare(folder: Path) -> None:
    """The tokenizer and the token files, unless they are there."""
    if (folder / "tokenizer").exists():
        return
    documents, sample, size = corpus(), [], 0
    with (folder / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": document.text}) + "\n" for document in documents)
    for document in documents:
        if (size := size + document.nbytes) > TOKENIZER_BYTES:
            break
        sample.append(document.text)
    train_tokenizer(sample, VOCABULARY).save_pretrained(folder / "tokenizer")


def command(folder: Path, *arguments: str) -> None:
    """Run `mambalm` there."""
    subprocess.run([sys.executable, "-m", "mambalm", *arguments], cwd=folder, check=True)


def changes(tokens: int) -> list[str]:
    """The recipes' stages, scaled to so many tokens."""
    first = int(0.58 * tokens)
    return [
        f"stages.context-2048.tokens={first}",
        f"stages.context-2048.ramp.tokens={tokens // 12}",
        f"stages.context-8192.tokens={tokens - first}",
        f"schedule.warmup={tokens // 60}",
        f"schedule.decay={tokens // 4}",
        f"data.held_out={HELD_OUT}",
        "evaluation.sequences=100k",
    ]


def compressed(folder: Path) -> dict[str, Any]:
    """What xz makes of the held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    held_out = Corpus.open(folder / "tokens", held_out=HELD_OUT, split="held_out")
    ids = held_out.read(0, held_out.tokens).tokens.tolist()
    data = tokenizer.decode(ids, skip_special_tokens=True).encode()
    return {"bytes": len(data), "tokens": len(ids), "xz -9": 8 * len(lzma.compress(data, preset=9)) / len(data)}


def main() -> None:
    """Run what is left to run, and write down what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.python_run", description=__doc__)
    parser.add_argument("--tokens", default="45M", help="of each run")
    parser.add_argument("--output", type=Path, default=Path("runs/python"))
    parser.add_argument("--commit", default="", help="what was measured, where there is no git")
    options = parser.parse_args()
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    command(folder, "tokenize", "corpus.jsonl", "-o", "tokens", "--tokenizer", "tokenizer", "--shard-megabytes", "8")
    for name in RECIPES:
        command(folder, "train", name, *changes(parse_count(options.tokens)), "--output", name)
    results = compressed(folder)
    for name in RECIPES:
        lines = [line for line in read_metrics(folder / name / "metrics.jsonl") if "held_out/bits_per_byte" in line]
        results[name] = lines[-1]["held_out/bits_per_byte"]
    summary = {**provenance(options.commit), "tokens_per_run": options.tokens, "held_out": results}
    (folder / "python.json").write_text(json.dumps(summary, indent=1) + "\n")
    metrics = {name: folder / name / "metrics.jsonl" for name in RECIPES}
    plot_runs(metrics, {"xz -9": results["xz -9"]}, folder / "python.png")
    exported = load(folder / RECIPES[0] / "model")
    exported.save_pretrained(folder / "export", max_shard_size="15MB")
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "export")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
