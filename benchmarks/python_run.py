"""A small Mamba beside a Transformer++ on Python sources: `python -m benchmarks.python_run [--tokens 45M]`.

Makes the corpus (the standard library and the installed packages of the running Python), the tokenizer and the token
files, trains both recipes through their stages on the GPU, and writes beside the runs `python.json`, with held-out bits
per byte of both and of xz, `python.png` with both curves, and the Mamba's bfloat16 export in shards. Interrupted, it
goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
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
VOCABULARY = 8000
LARGEST = 200_000  # bytes of a file; above are tables
TOKENIZER_BYTES = 12_000_000


def corpus(folder: Path | None) -> list[Document]:
    """Every text of the folder, or of this Python's, once, in the order of a hash of the names."""
    installed = Path(sysconfig.get_paths()["purelib"])
    documents = read_documents(folder) if folder else [*standard_library(), *read_documents(installed)]
    texts = {document.text: document for document in documents if document.nbytes <= LARGEST}
    return sorted(texts.values(), key=lambda document: hash_of(document.name))


def hash_of(name: str) -> bytes:
    """An order that is the same on every machine."""
    return hashlib.sha256(name.encode()).digest()


def prepare(folder: Path, source: Path | None) -> None:
    """The tokenizer and the token files, unless they are there."""
    if (folder / "tokenizer").exists():
        return
    documents, sample, size = corpus(source), [], 0
    with (folder / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": document.text}) + "\n" for document in documents)
    for document in documents:
        if (size := size + document.nbytes) > TOKENIZER_BYTES:
            break
        sample.append(document.text)
    train_tokenizer(sample, VOCABULARY).save_pretrained(folder / "tokenizer")


def command(folder: Path, *arguments: str) -> None:
    """Run `mambalm` there, the one that runs here."""
    here = os.pathsep.join(str(Path(path).resolve()) for path in sys.path)
    environment = os.environ | {"PYTHONPATH": here}
    subprocess.run([sys.executable, "-m", "mambalm", *arguments], cwd=folder, env=environment, check=True)


def changes(tokens: int, held_out: float) -> list[str]:
    """The recipes' stages, scaled to so many tokens."""
    first = int(0.58 * tokens)
    return [
        f"stages.context-2048.tokens={first}",
        f"stages.context-2048.ramp.tokens={tokens // 12}",
        f"stages.context-8192.tokens={tokens - first}",
        f"schedule.warmup={tokens // 60}",
        f"schedule.decay={tokens // 4}",
        f"data.held_out={held_out}",
        "evaluation.sequences=100k",
    ]


def compressed(folder: Path, share: float) -> dict[str, Any]:
    """What xz makes of the held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    held_out = Corpus.open(folder / "tokens", held_out=share, split="held_out")
    ids = held_out.read(0, held_out.tokens).tokens.tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    data = text.encode()
    return {"bytes": len(data), "tokens": len(ids), "xz -9": 8 * len(lzma.compress(data, preset=9)) / len(data)}


def main() -> None:
    """Run what is left to run, and write down what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.python_run", description=__doc__)
    parser.add_argument("--tokens", default="45M", help="of each run")
    parser.add_argument("--output", type=Path, default=Path("runs/python"))
    parser.add_argument("--commit", default="", help="what was measured, where there is no git")
    parser.add_argument("--held-out", type=float, default=0.01, help="share of the documents")
    parser.add_argument("--corpus", type=Path, help="a folder of Python files, instead of what this Python has")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="further changes of both recipes")
    options = parser.parse_args()
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, options.corpus)
    command(folder, "tokenize", "corpus.jsonl", "-o", "tokens", "--tokenizer", "tokenizer", "--shard-megabytes", "8")
    for name in RECIPES:
        changed = [*changes(parse_count(options.tokens), options.held_out), *options.changes]
        command(folder, "train", name, *changed, "--output", name)
    results = compressed(folder, options.held_out)
    for name in RECIPES:
        lines = [line for line in read_metrics(folder / name / "metrics.jsonl") if "held_out/bits_per_byte" in line]
        results[name] = lines[-1]["held_out/bits_per_byte"]
    summary = {**provenance(options.commit), "tokens_per_run": options.tokens, "held_out": results}
    (folder / "python.json").write_text(json.dumps(summary, indent=1) + "\n")
    metrics = {name: folder / name / "metrics.jsonl" for name in RECIPES}
    plot_runs(metrics, {"xz -9": results["xz -9"]}, folder / "python.png")
    exported = load(folder / RECIPES[0] / "model", dtype=torch.bfloat16)
    exported.save_pretrained(folder / "export", max_shard_size="15MB")
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "export")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
