"""`mambalm read`: the state it writes, resuming after a kill, and `generate --state` behind it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import mambalm_cli
from mambalm.cli.read import Reading
from mambalm.generation import Settings
from mambalm.generation.session import Session

TEXT = "def quicksort(numbers): return sorted(numbers)\r\nhéllo wörld, 😀 the quick brown fox\n" * 600
QUICK = ("--device", "cpu", "--chunk-size", "512")


def call(*arguments: str | Path, stdin: bytes | str | None = None) -> Result:
    return CliRunner().invoke(mambalm_cli.app, [str(argument) for argument in arguments], input=stdin)


def contents(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture(scope="module")
def whole(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Session:
    """A session that has read the whole text, tokenised at once."""
    session = Session(tiny_model, tiny_tokenizer, chunk_size=512)
    session.read(tiny_tokenizer(TEXT)["input_ids"])
    return session


@pytest.fixture
def expected(whole: Session, tmp_path: Path) -> dict[str, bytes]:
    whole.save(tmp_path / "expected.state")
    return contents(tmp_path / "expected.state")


def test_the_state_is_that_of_the_whole_text(tiny_checkpoint: Path, book: Path, expected: dict[str, bytes]) -> None:
    output = book.with_name("book.state")
    result = call("read", tiny_checkpoint, book, "-o", output, *QUICK)
    assert result.exit_code == 0, result.output
    assert contents(output) == expected
    assert "tokens/s" in result.stderr
    assert result.stdout == ""
    assert not output.with_name("book.state.partial").exists()


def test_read_in_two_parts(tiny_checkpoint: Path, book: Path, expected: dict[str, bytes]) -> None:
    first, second = book.with_name("first.state"), book.with_name("second.state")
    data = TEXT.encode()
    cut = data.index(b" the quick", len(data) // 2)
    assert call("read", tiny_checkpoint, "-", "-o", first, *QUICK, stdin=data[:cut]).exit_code == 0
    result = call("read", tiny_checkpoint, "-", "-o", second, "--state", first, *QUICK, stdin=data[cut:])
    assert result.exit_code == 0, result.output
    session = {name: value for name, value in contents(second).items() if name in ("counts", "state.position")}
    assert session == {name: expected[name] for name in session}


@pytest.fixture
def killed(tiny_checkpoint: Path, book: Path) -> Path:
    """The output of a run that was killed behind its first checkpoint, with a third of the text still to come."""
    output = book.with_name("book.state")
    partial = output.with_name("book.state.partial")
    command = [sys.executable, "-m", "mambalm", "read", str(tiny_checkpoint), "-", "-o", str(output), *QUICK]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    data = TEXT.encode()
    process = subprocess.Popen(
        [*command, "--checkpoint-seconds", "0"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        process.stdin.write(data[: 2 * len(data) // 3])
        process.stdin.flush()
        deadline = time.monotonic() + 150
        while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert partial.exists(), "no checkpoint was written"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    return output


def test_killed_and_resumed(tiny_checkpoint: Path, book: Path, killed: Path, expected: dict[str, bytes]) -> None:
    partial = killed.with_name("book.state.partial")
    left = partial.read_bytes()
    other = book.with_name("other.txt")
    other.write_bytes(b"x" + TEXT.encode())
    empty = book.with_name("empty.state")
    assert call("read", tiny_checkpoint, "-", "-o", empty, *QUICK, stdin="another beginning").exit_code == 0
    refusals = {
        "the text is another one": (other, *QUICK),
        "it was begun with --chunk-size 512": (book, "--device", "cpu", "--chunk-size", "256"),
        "its text began behind another --state": (book, "--state", empty, *QUICK),
    }
    for reason, (text, *options) in refusals.items():
        result = call("read", tiny_checkpoint, text, "-o", killed, *options)
        assert result.exit_code == 2
        assert reason in result.stderr
        assert "--restart begins anew" in result.stderr
    assert partial.read_bytes() == left
    # As if it had been killed within its next checkpoint.
    within = killed.parent / ".book.state.partial.0123abcd.incomplete"
    within.mkdir()
    (within / ".tmpAbCdEf").write_bytes(left[:100])
    result = call("read", tiny_checkpoint, book, "-o", killed, *QUICK)
    assert result.exit_code == 0, result.output
    assert "Resuming at token" in result.stderr
    assert contents(killed) == expected
    assert not list(killed.parent.glob("*.partial*")) + list(killed.parent.glob(".*"))
    # With --restart a checkpoint is not even looked at.
    partial.write_bytes(b"damaged")
    result = call("read", tiny_checkpoint, book, "-o", killed, *QUICK)
    assert result.exit_code == 2
    assert "--restart begins anew" in result.stderr
    assert call("read", tiny_checkpoint, book, "-o", killed, "--restart", *QUICK).exit_code == 0
    assert contents(killed) == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("seconds", ["0", "99"])
def test_interrupted_it_keeps_what_was_read(
    seconds: str, number: int, code: int, tiny_checkpoint: Path, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls, output = Session.read, list[int](), book.with_name("book.state")

    def interrupted(session: Session, tokens: list[int]) -> None:
        calls.append(len(tokens))
        if len(calls) == 3:
            signal.raise_signal(number)
        read(session, tokens)

    command = ("read", tiny_checkpoint, book, "-o", output, "--checkpoint-seconds", seconds, *QUICK)
    monkeypatch.setattr(Session, "read", interrupted)
    result = call(*command)
    assert result.exit_code == code
    assert f"Interrupted; the same command goes on from token {sum(calls[:2]):,}." in result.stderr
    assert not output.exists()
    monkeypatch.setattr(Session, "read", read)
    result = call(*command)
    assert f"Resuming at token {sum(calls[:2]):,}." in result.stderr
    whole = book.with_name("whole.state")
    assert call("read", tiny_checkpoint, book, "-o", whole, *QUICK).exit_code == 0
    assert output.read_bytes() == whole.read_bytes()


def test_interrupted_at_once_it_begins_anew(tiny_checkpoint: Path, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "read", lambda session, tokens: signal.raise_signal(signal.SIGINT))
    result = call("read", tiny_checkpoint, book, "-o", book.with_name("a.state"), *QUICK)
    assert result.exit_code == 130
    assert "Interrupted; the same command begins anew" in result.stderr
    assert sorted(book.parent.iterdir()) == [book]


def test_what_ends_a_text_is_read_once_though_interrupted_there(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    book: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tokenizer that puts a token behind a text, and a run that ends between the text's end and the state file."""
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    tiny_model.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "model")

    def interrupted(reading: Reading) -> None:
        raise KeyboardInterrupt

    command = ("read", tmp_path / "model", book, "-o", tmp_path / "a.state", "--checkpoint-seconds", "0", *QUICK)
    with monkeypatch.context() as patched:
        patched.setattr(Reading, "finish", interrupted)
        assert call(*command).exit_code == 130
    assert call(*command).exit_code == 0
    counts = load_file(tmp_path / "a.state")["counts"]
    assert counts.sum() == len(tiny_tokenizer(TEXT)["input_ids"]) + 1
    assert counts[0] == 1


def test_progress_tells_speed_and_the_time_left(
    tiny_checkpoint: Path, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mambalm.training.progress._LINE_EVERY", 0.0)
    result = call("read", tiny_checkpoint, book, "-o", book.with_name("a.state"), *QUICK)
    assert re.search(r"Reading \d+% · [\d,]+ tokens, [\d,]+ tokens/s, \d+:\d\d left", result.stderr)


def test_generate_behind_a_state(
    tiny_checkpoint: Path, tiny_tokenizer: PreTrainedTokenizerFast, whole: Session, tmp_path: Path
) -> None:
    state = tmp_path / "book.state"
    whole.save(state)
    options = ("--state", state, "--max-new-tokens", "6", "--device", "cpu")

    def expected(text: str) -> str:
        fork = whole.fork()
        fork.read(tiny_tokenizer(text)["input_ids"])
        return "".join(fork.write_text(Settings(max_new_tokens=6, end_tokens=frozenset({0}))))

    for prompts in (["the fox"], []):
        result = call("generate", tiny_checkpoint, *prompts, *options)
        assert result.exit_code == 0, result.output
        assert result.stdout.rstrip("\n") == expected("".join(prompts)).rstrip("\n")
    result = call("generate", tiny_checkpoint, "the fox", "def", *options)
    assert result.stdout == f"--- 1\n{expected('the fox')}\n--- 2\n{expected('def')}\n"
    texts = {0: "", 1: ""}
    for line in call("generate", tiny_checkpoint, "the fox", "def", "--logprobs", "1", *options).stdout.splitlines():
        token = json.loads(line)
        texts[token["row"]] += token["text"]
        assert token["logprob"] == token["likeliest"][0]["logprob"] < 0
    assert texts == {0: expected("the fox"), 1: expected("def")}


def test_what_cannot_be_read_is_told_in_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    told = {"empty.txt": "the text is empty", "latin.txt": "is not UTF-8", "no.txt": "no.txt does not exist: name a"}
    for name, message in told.items():
        result = call("read", tiny_checkpoint, tmp_path / name, "-o", tmp_path / "a.state", *QUICK)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert not (tmp_path / "a.state").exists()
    (tmp_path / "good.txt").write_text("the fox")
    for output in (tmp_path, tmp_path / "missing" / "a.state"):
        result = call("read", tiny_checkpoint, tmp_path / "good.txt", "-o", output, *QUICK)
        assert result.exit_code == 2
        assert "name a file in a folder that exists" in result.stderr
    text = (tmp_path / "good.txt").read_bytes()
    result = call("read", tiny_checkpoint, tmp_path / "good.txt", "-o", tmp_path / "good.txt", *QUICK)
    assert result.exit_code == 2
    assert "is the text itself" in result.stderr
    assert (tmp_path / "good.txt").read_bytes() == text
