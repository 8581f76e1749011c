"""The quickstart from end to end on a small corpus: outputs, interruption, resumption, clear errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from transformers import AutoTokenizer
from typer.testing import CliRunner

import mambalm
from mambalm.data.documents import hold_out, read_documents
from mambalm.evaluation.bits_per_byte import bits_per_byte
from mambalm.training.progress import ProgressBar
from mambalm_cli import app

SOURCES = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own ops and layers, each file a package of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("ops", "layers"):
        for path in sorted((SOURCES / "mambalm" / name).rglob("*.py")):
            (folder / path.relative_to(SOURCES).as_posix().replace("/", "_")).write_bytes(path.read_bytes())
    return folder


def quickstart(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["quickstart", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder and the text of a run of a few seconds."""
    output = tmp_path_factory.mktemp("run") / "out"
    result = quickstart("--minutes", 0.1, "--corpus", corpus, "--output", output, "--prompt", "import ")
    assert result.exit_code == 0, result.output
    return output, result.output


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
    output, _ = finished
    documents = read_documents(corpus)
    split = hold_out(documents, sum(document.nbytes for document in documents) // 8)
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    found = bits_per_byte(mambalm.load(output / "model"), tokenizer, split.held_out_stream)
    results = json.loads((output / "results.json").read_text())
    assert found.nbytes == results["bytes"]
    # The quickstart may have computed in bfloat16.
    assert found.bits_per_byte == pytest.approx(results["bits_per_byte"]["mamba"], rel=0.01)


def test_a_finished_run_is_only_measured_again(finished: tuple[Path, str], corpus: Path) -> None:
    output, _ = finished
    kept = output / "training_state.pt", output / "results.json"
    before = [path.read_bytes() for path in kept]
    result = quickstart("--minutes", 0.01, "--corpus", corpus, "--output", output)
    assert result.exit_code == 0, result.output
    assert "is finished: measuring it again" in result.output
    assert [path.read_bytes() for path in kept] == before


def test_a_signal_saves_and_the_run_goes_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    texts: list[str] = []

    def update(bar: ProgressBar, fraction: float, text: str) -> None:
        texts.append(text)
        if len(texts) == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "update", update)
        result = quickstart("--minutes", 10, "--corpus", corpus, "--output", output)
    assert result.exit_code == 128 + signal.SIGTERM
    assert "goes on from step 3" in result.output
    assert all("tokens/s" in text and "left" in text for text in texts)
    mambalm.load(output / "model")
    result = quickstart("--minutes", 0.01, "--corpus", corpus, "--output", output)
    assert result.exit_code == 0, result.output
    assert "Resuming at step 3" in result.output or "is finished" in result.output


def test_restart_forgets_the_earlier_run(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "training_state.pt").write_bytes(b"not a checkpoint")
    (output / "notes.txt").write_text("mine")
    result = quickstart("--minutes", 0.01, "--corpus", corpus, "--output", output, "--restart")
    assert result.exit_code == 0, result.output
    assert "Resuming" not in result.output
    assert (output / "notes.txt").read_text() == "mine"


def test_kill_9_leaves_a_checkpoint_that_loads(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["--minutes", "10", "--corpus", str(corpus), "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCES)}
    process = subprocess.Popen(
        [sys.executable, "-m", "mambalm", "quickstart", *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    # From the first words about the run on there is a checkpoint.
    assert "parameters" in process.stdout.readline()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    mambalm.load(output / "model")


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
        (("--corpus", corpus, "--output", in_the_way), "cannot be written to; choose another with --output"),
        (("--corpus", corpus, "--output", damaged), "training_state.pt is damaged or no saved run: restart"),
        (("--corpus", tmp_path / "none", "--output", tmp_path / "a"), "none is not a folder"),
        (("--minutes", 0, "--output", tmp_path / "b"), "--minutes must be above 0"),
    ]
    for arguments, message in cases:
        result = quickstart(*arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
        assert "Traceback" not in result.output
    assert not (tmp_path / "a").exists(), "nothing is left behind"
