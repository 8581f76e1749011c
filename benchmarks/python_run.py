"""A small Mamba beside a Transformer++ on Python sources: `python -m benchmarks.python_run [--tokens 120M]`.

Makes the corpus (the standard library and the installed packages of the running Python), the tokenizer and the token
files, and trains the recipes through their stages on the GPU: a Mamba and a Transformer++ of 28M parameters, and a
Mamba of 6M. Beside the runs it writes `python.json`, with bits per byte of each and of xz on held-out documents and on
packages that were left out of the corpus, `python.png` with the curves, and the Mambas' bfloat16 exports in shards.
Interrupted, it goes on.
"""

from __future__ import annotations

import argparse
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
from mambalm.data.documents import Split, hold_out, read_documents, standard_library
from mambalm.data.mixture import Mixture, Source, open_stream
from mambalm.data.token_files import METADATA
from mambalm.data.tokenizer import train_tokenizer
from mambalm.models.loading import load
from mambalm.training.curve import plot_runs
from mambalm.training.held_out import HeldOut, token_bytes
from mambalm.training.metrics import read_metrics
from mambalm.training.precision import autocast
from mambalm.training.recipe import parse_count

RECIPES = ("mamba-28m-python", "transformerpp-28m-python", "mamba-6m-python")
EXPORTED = ("mamba-28m-python", "mamba-6m-python")
VOCABULARY = 8000
TEXTS = (("corpus", "tokens"), ("unseen", "unseen"))
TOKENIZE = ("--tokenizer", "tokenizer", "--shard-megabytes", "8")
LARGEST = 200_000  # bytes of a file; above are tables
TOKENIZER_BYTES = 12_000_000
UNSEEN_BYTES = 3_000_000  # of the packages that are left out of the corpus, at most, and of a corpus that is small
UNSEEN_SHARE = 0.02
CONTEXT = 8192  # of the last measurement


def corpus(folder: Path | None) -> Split:
    """Every text of the folder, or of this Python's, once, in the order of a hash of the names; some packages apart."""
    installed = Path(sysconfig.get_paths()["purelib"])
    documents = read_documents(folder) if folder else [*standard_library(), *read_documents(installed)]
    texts = {document.text: document for document in documents if document.nbytes <= LARGEST}
    total = sum(document.nbytes for document in texts.values())
    return hold_out(list(texts.values()), min(UNSEEN_BYTES, int(UNSEEN_SHARE * total)))


def prepare(folder: Path, source: Path | None) -> None:
    """The tokenizer and the text, unless they are there."""
    if (folder / "tokenizer").exists():
        return
    split, sample, size = corpus(source), [], 0
    for name, documents in (("corpus", split.training), ("unseen", split.held_out)):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": document.text}) + "\n" for document in documents)
    for document in split.training:
        if (size := size + document.nbytes) > TOKENIZER_BYTES:
            break
        sample.append(document.text)
    train_tokenizer(sample, VOCABULARY).save_pretrained(folder / "tokenizer")


def start(folder: Path, *arguments: str, gpu: int = 0) -> subprocess.Popen[bytes]:
    """Start `mambalm` there, the one that runs here, on one GPU."""
    here = os.pathsep.join(str(Path(path).resolve()) for path in sys.path)
    environment = os.environ | {"PYTHONPATH": here}
    if torch.cuda.device_count() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    return subprocess.Popen([sys.executable, "-m", "mambalm", *arguments], cwd=folder, env=environment)


def finish(started: list[subprocess.Popen[bytes]]) -> None:
    """Wait for them.

    Raises:
        subprocess.CalledProcessError: one failed; the others were waited for.
    """
    codes = [(process, process.wait()) for process in started]
    for process, code in codes:
        if code:
            raise subprocess.CalledProcessError(code, process.args)


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


def xz(folder: Path, tokens: str, **split: Any) -> dict[str, Any]:
    """What xz makes of the text of token files."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    corpus = Corpus.open(folder / tokens, **split)
    ids = corpus.read(0, corpus.tokens).tokens.tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    data = text.encode()
    return {"bytes": len(data), "tokens": len(ids), "xz -9": 8 * len(lzma.compress(data, preset=9)) / len(data)}


def unseen(folder: Path, name: str, device: torch.device, context: int) -> float:
    """Bits per byte of a trained model on the packages that no run has seen, in sequences of ``context`` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    stream = open_stream(Mixture([Source(str(folder / "unseen"))], "concatenated"), length=context, tokenizer=tokenizer)
    model = load(folder / name / "model", dtype=torch.float32, device=str(device))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    held_out = HeldOut(stream, len(stream), 4, token_bytes(tokenizer), lambda: autocast(device, dtype))
    return held_out.measure(model, device)["held_out/bits_per_byte"]


def export(folder: Path, name: str) -> None:
    """The trained model in shards that any mail or repository takes."""
    model = load(folder / name / "model", dtype=torch.bfloat16)
    model.save_pretrained(folder / "export" / name, max_shard_size="15MB")
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "export" / name)


def report(folder: Path, options: argparse.Namespace, device: torch.device) -> None:
    """Measure, draw and write down what the runs have come to; those that are not over are left out."""
    over = [name for name in RECIPES if (folder / name / "model").exists()]
    held_out = xz(folder, "tokens", held_out=options.held_out, split="held_out")
    packages = xz(folder, "unseen")
    context = min(CONTEXT, packages["tokens"] - 1)
    for name in over:
        lines = [line for line in read_metrics(folder / name / "metrics.jsonl") if "held_out/bits_per_byte" in line]
        held_out[name] = lines[-1]["held_out/bits_per_byte"]
        packages[name] = unseen(folder, name, device, context)
        if name in EXPORTED:
            export(folder, name)
    found = {"tokens_per_run": options.tokens, "held_out_documents": held_out, "packages_left_out": packages}
    (folder / "python.json").write_text(json.dumps({**provenance(options.commit), **found}, indent=1) + "\n")
    metrics = {name: folder / name / "metrics.jsonl" for name in RECIPES}
    plot_runs(metrics, {"xz -9": held_out["xz -9"]}, folder / "python.png")
    print(json.dumps(found, indent=1))


def main() -> None:
    """Run what is left to run, and write down what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.python_run", description=__doc__)
    parser.add_argument("--tokens", default="120M", help="of each run")
    parser.add_argument("--output", type=Path, default=Path("runs/python"))
    parser.add_argument("--commit", default="", help="what was measured, where there is no git")
    parser.add_argument("--held-out", type=float, default=0.01, help="share of the documents")
    parser.add_argument("--corpus", type=Path, help="a folder of Python files, instead of what this Python has")
    parser.add_argument("--together", action="store_true", help="all runs at once")
    parser.add_argument("--gpus", type=int, nargs=len(RECIPES), default=[0] * len(RECIPES), help="of each run")
    parser.add_argument("--only-prepare", action="store_true", help="end before the first run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="further changes of all recipes")
    options = parser.parse_intermixed_args()
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, options.corpus)
    left = [(text, tokens) for text, tokens in TEXTS if not (folder / tokens / METADATA).exists()]
    finish([start(folder, "tokenize", f"{text}.jsonl", "-o", tokens, *TOKENIZE) for text, tokens in left])
    if options.only_prepare:
        return
    changed = [*changes(parse_count(options.tokens), options.held_out), *options.changes]
    started = []
    try:
        for name, gpu in zip(RECIPES, options.gpus, strict=True):
            made = ("train", name, *changed, "--output", name, "--device", options.device)
            started.append(start(folder, *made, gpu=gpu))
            if not options.together:
                finish(started)
        finish(started)
    finally:
        report(folder, options, torch.device(options.device))


if __name__ == "__main__":
    main()
