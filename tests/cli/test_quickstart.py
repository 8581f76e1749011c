"""The quickstart from end to end on a small corpus: outputs, interruption, resumption, clear errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import mambalm

MODULES = Path(__file__).parents[2] / "src" / "mambalm"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own sources, each a module at the top."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(MODULES.rglob("*.py")):
        (folder / path.relative_to(MODULES).as_posix().replace("/", "_")).write_bytes(path.read_bytes())
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mambalm", "quickstart", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(MODULES.parent), "COLUMNS": "200"}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment, timeout=170, check=False
    )


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The output folder and the text of a run of a few seconds."""
    output = tmp_path_factory.mktemp("run") / "out"
    result = run("--minutes", 0.1, "--corpus", corpus, "--output", output, "--prompt", "import ")
    assert result.returncode == 0, result.stderr
    yield output, result.stdout


def test_writes_a_checkpoint_a_curve_and_figures(finished: tuple[Path, str]) -> None:
    output, text = finished
    model = mambalm.load(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((output / "results.json").read_text())
    figures = results["bits_per_byte"]
    assert list(figures) == ["mamba", "xz -9", "gzip -9"]
    # It has learned something in its seconds: a text without any pattern takes 8.
    assert 0.5 < figures["mamba"] < 6
    assert figures["xz -9"] < figures["gzip -9"] < 4
    assert results["tokens"] > 0
    for name, value in figures.items():
        assert name in text
        assert f"{value:.3f}" in text
    assert "import " in text.partition("a prompt, continued")[2]
    assert {path.name for path in output.iterdir()} == {"model", "loss.png", "results.json", "training_state.pt"}


def test_the_held_out_figure_is_that_of_the_saved_model(finished: tuple[Path, str], corpus: Path) -> None:
    from mambalm.data.documents import hold_out, read_documents
    from mambalm.evaluation.bits_per_byte import bits_per_byte

    output, _ = finished
    documents = read_documents(corpus)
    split = hold_out(documents, sum(document.nbytes for document in documents) // 10)
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    found = bits_per_byte(mambalm.load(output / "model"), tokenizer, split.held_out_stream)
    results = json.loads((output / "results.json").read_text())
    assert found.nbytes == results["bytes"]
    # The quickstart may have computed in bfloat16.
    assert found.bits_per_byte == pytest.approx(results["bits_per_byte"]["mamba"], rel=0.01)


def test_a_finished_run_is_only_measured_again(finished: tuple[Path, str], corpus: Path) -> None:
    output, _ = finished
    before = (output / "training_state.pt").read_bytes(), json.loads((output / "results.json").read_text())
    result = run("--minutes", 0.05, "--corpus", corpus, "--output", output)
    assert result.returncode == 0, result.stderr
    assert "is finished: measuring it again" in result.stdout
    assert ((output / "training_state.pt").read_bytes(), json.loads((output / "results.json").read_text())) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_loads_and_goes_on(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "out"
    arguments = ("--minutes", 30, "--corpus", corpus, "--output", output)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(MODULES.parent)}
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    # From the first words about the run on there is a checkpoint.
    assert "parameters" in process.stdout.readline()
    time.sleep(3)
    process.send_signal(number)
    text = process.stdout.read()
    code = process.wait()
    mambalm.load(output / "model")
    if number == signal.SIGKILL:
        assert code == -number
        return
    assert code == 128 + number
    assert "Interrupted." in text
    result = run("--minutes", 0.01, "--corpus", corpus, "--output", output)
    assert result.returncode == 0, result.stderr


def test_bad_input_is_told_in_a_line(corpus: Path, tmp_path: Path, finished: tuple[Path, str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "model").symlink_to(finished[0] / "model")
    (damaged / "training_state.pt").write_bytes(b"not a checkpoint")
    cases = [
        (("--corpus", empty, "--output", tmp_path / "a"), "holds no *.py file"),
        (("--corpus", corpus, "--output", in_the_way), "cannot be written; choose another with --output"),
        (("--corpus", corpus, "--output", damaged), "training_state.pt is damaged or no saved run: restart"),
        (("--minutes", 0, "--output", tmp_path / "b"), "--minutes must be above 0"),
    ]
    for arguments, message in cases:
        result = run(*arguments)
        assert result.returncode == 2, arguments
        assert message in result.stderr
        assert "Traceback" not in result.stderr
