"""Prefill and decode on a CPU beside transformers and llama.cpp: `python -m benchmarks.cpu [--llama PYTHON]`.

Every side loads the same random weights and answers in a process of its own; the sides take turns, round after round,
so that whatever else the machine does falls on all of them. Only ratios of medians within one run mean something. Sides
whose logits are not those of our float32 model, within their format's rounding, are not timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.__main__ import RESULTS
from mambalm.models.mamba import MambaForCausalLM
from mambalm.models.mamba2 import Mamba2ForCausalLM

SIZES = {"130m": (768, 24), "370m": (1024, 48)}
LLAMA = Path(__file__).parent / "cpu_llama.py"
# The relative error of the logits that a format may have against float32, on random weights.
ALLOWED = {"float32": 1e-3, "F32": 1e-3, "bfloat16": 0.1, "BF16": 0.1, "F16": 0.05, "int8": 0.1, "Q8_0": 0.1}
ALLOWED |= {"int4": 0.6, "Q4_0": 0.6}


class Side:
    """A process that answers questions."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name, self.kind = name, name.split()[1]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        if self._out.readline().strip() != "ready":
            raise RuntimeError(f"{name} did not start: {' '.join(command)}")

    def ask(self, *question: object) -> Any:
        """The answer to a question."""
        print(*question, file=self._in, flush=True)
        return json.loads(self._out.readline())

    def stop(self) -> None:
        """End the process."""
        self._in.close()
        self._process.wait()


def checkpoint(model_name: str, folder: Path) -> None:
    """Write a model with random weights as transformers does, and as numpy for llama.cpp."""
    family, size = model_name.split("-")
    hidden, layers = SIZES[size]
    common = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": 50280, "tie_word_embeddings": True}
    classes = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}
    own = {"mamba2": {"num_heads": hidden // 32, "head_dim": 64, "state_size": 128, "n_groups": 1}}
    torch.manual_seed(0)
    model = classes[family](classes[family].config_class(**common, **own.get(family, {})))
    model.save_pretrained(folder)
    weights = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    np.savez(folder / "weights.npz", **weights)  # type: ignore[arg-type]


def commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """How to start each side."""
    threads = str(options.threads)
    here = [sys.executable, "-m", "benchmarks.cpu_sides"]
    found = {f"mambalm {kind}": [*here, "mambalm", str(folder), kind, threads] for kind in options.ours}
    found |= {f"transformers {kind}": [*here, "transformers", str(folder), kind, threads] for kind in options.stock}
    if options.llama:
        whole = folder / "F32.gguf"
        llama = [options.llama, "-P", str(LLAMA)]  # without this folder on its path, which has a tokenize.py
        subprocess.run([*llama, "export", folder, whole], check=True, stdout=subprocess.DEVNULL)
        for kind in options.formats:
            file = folder / f"{kind}.gguf"
            if kind != "F32":
                command = [*llama, "quantize", whole, kind, file]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found[f"llama.cpp {kind}"] = [*llama, "serve", str(file), threads, *["plain"] * options.plain]
    return found


def errors(sides: list[Side]) -> dict[str, float]:
    """The relative error of each side's logits against our float32 ones."""
    logits = {side.name: np.array(side.ask("logits", 40, 50280)) for side in sides}
    truth = logits["mambalm float32"]
    return {name: float(np.linalg.norm(x - truth) / np.linalg.norm(truth)) for name, x in logits.items()}


def measure(sides: list[Side], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The median tokens per second of each side."""
    rates: dict[str, dict[str, list[float]]] = {side.name: {"prefill": [], "decode": []} for side in sides}
    for round in range(options.rounds + 1):
        for side in sides:
            slow = side.name.startswith("transformers")
            for what, count in (("prefill", options.prefill), ("decode", options.decode)):
                if what == "prefill" and slow and round > 2:
                    continue
                tokens = count // 4 if slow and what == "decode" else count
                rate = tokens / side.ask(what, tokens)
                if round:  # the first warms up
                    rates[side.name][what].append(rate)
    return {name: {what: round_(statistics.median(all)) for what, all in both.items()} for name, both in rates.items()}


def round_(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def main() -> None:
    """Run the sides and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mamba-130m", "mamba2-130m"], help="FAMILY-SIZE")
    parser.add_argument("--llama", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--plain", action="store_true", help="llama.cpp reads prompts without AMX, where that crashes")
    parser.add_argument("--ours", nargs="*", default=["float32", "bfloat16", "int8", "int4"])
    parser.add_argument("--stock", nargs="*", default=["float32"])
    parser.add_argument("--formats", nargs="*", default=["F32", "F16", "BF16", "Q8_0", "Q4_0"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint(name, Path(folder))
            sides = [Side(*item) for item in commands(options, Path(folder)).items()]
            wrong = errors(sides)
            right = [side for side in sides if wrong[side.name] <= ALLOWED[side.kind]]
            rates = measure(right, options)
            for side in sides:
                side.stop()
        write(name, options, wrong, rates)


def write(name: str, options: argparse.Namespace, wrong: dict[str, float], rates: dict[str, dict[str, float]]) -> None:
    """One JSON file per model."""
    cpu = processor()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    header = {
        "cpu": cpu,
        "threads": options.threads,
        "rounds": options.rounds,
        "tokens": {"prefill": options.prefill, "decode": options.decode},
        "versions": {package: version(package) for package in ("torch", "transformers", "numba")},
        "llama-cpp-python": _llama_version(options.llama),
        "commit": commit.strip(),
        "unit": "tokens per second, median",
    }
    sides = {side: {"logits_error": round_(error), **rates.get(side, {})} for side, error in wrong.items()}
    folder = options.output / folder_of(cpu)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**header, "sides": sides}, indent=1)
    (folder / f"{name}-cpu.json").write_text(text + "\n")
    print(text, flush=True)


def processor() -> str:
    """The name of this machine's processor."""
    names = (line.split(": ")[1].strip() for line in _cpu_info() if line.startswith("model name"))
    return next(names, platform.machine())


def folder_of(processor: str) -> str:
    """The folder of a processor's results."""
    return processor.lower().replace("(r)", "").replace(" ", "-")


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().replace("\t", "").splitlines() if path.exists() else []


def _llama_version(python: str | None) -> str | None:
    if python is None:
        return None
    code = "import llama_cpp; print(llama_cpp.__version__)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
