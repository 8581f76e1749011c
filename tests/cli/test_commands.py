"""The command line: what it prints, where errors go, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import mambalm
import mambalm_cli
from mambalm.data.tokenizer import load_tokenizer
from mambalm.diagnostics.verify import Check
from mambalm.generation import Token
from mambalm.models import attach_adapter, load_adapter
from mambalm.quantization.model import quantize_model


def call(*arguments: str | Path, stdin: str | None = None) -> Result:
    """Run `mambalm` with these arguments, in this process."""
    return CliRunner().invoke(mambalm_cli.app, [str(argument) for argument in arguments], input=stdin)


def expected_text(tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, count: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = tiny_model.generate(ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_help_lists_the_commands() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for name, line in mambalm_cli.COMMANDS.items():
        assert name in result.output
        assert line.split()[0] in result.output


def test_every_command_has_its_file_and_its_help() -> None:
    for name in mambalm_cli.COMMANDS:
        result = call(name, "--help")
        assert result.exit_code == 0, result.output
        assert f"mambalm {name}" in result.output


def test_generate_prints_the_continuation(
    tiny_checkpoint: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    result = call("generate", tiny_checkpoint, "def sort(", "--max-new-tokens", "9", "--device", "cpu")
    assert result.exit_code == 0, result.output
    expected = expected_text(tiny_model, tiny_tokenizer, "def sort(", 9)
    assert result.stdout.rstrip("\n") == expected.rstrip("\ufffd").rstrip("\n")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_generate_with_quantised_weights(
    tiny_checkpoint: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    quantization: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = mambalm.load
    asked = Mock(wraps=load)
    monkeypatch.setattr(mambalm, "load", asked)
    found = call("generate", tiny_checkpoint, "def sort(", "--max-new-tokens", "9", "--quantization", quantization)
    assert found.exit_code == 0, found.output
    assert asked.call_args.kwargs["quantization"] == quantization  # eight bits may write what all of them write
    quantised = load(tiny_checkpoint, quantization=quantization)
    expected = expected_text(quantised, tiny_tokenizer, "def sort(", 9)
    assert found.stdout.rstrip("\n") == expected.rstrip("\ufffd").rstrip("\n")


@pytest.fixture
def adapter(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Saved adapters on all projections, which change what the model writes."""
    torch.manual_seed(5)
    adapted, _ = attach_adapter(mambalm.load(tiny_checkpoint))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_generate_with_an_adapter(
    tiny_checkpoint: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    adapter: Path,
    quantization: str | None,
) -> None:
    options = () if quantization is None else ("--quantization", quantization)
    command = ("generate", tiny_checkpoint, "def sort(", "--max-new-tokens", "9", "--device", "cpu")
    found = call(*command, "--adapter", adapter, *options)
    assert found.exit_code == 0, found.output
    adapted, _ = load_adapter(mambalm.load(tiny_checkpoint), adapter)
    network: Any = adapted if quantization is None else adapted.merge_and_unload()
    if quantization is not None:
        network = quantize_model(network, quantization)
    expected = expected_text(network, tiny_tokenizer, "def sort(", 9)
    assert expected != expected_text(tiny_model, tiny_tokenizer, "def sort(", 9)
    assert found.stdout.rstrip("\n") == expected.rstrip("\ufffd").rstrip("\n")


def test_a_folder_without_an_adapter_is_refused(tiny_checkpoint: Path) -> None:
    result = call("generate", tiny_checkpoint, "fox", "--adapter", tiny_checkpoint)
    assert result.exit_code == 2
    assert "is no adapter's folder" in result.stderr


def test_an_unknown_quantization_is_refused(tiny_checkpoint: Path) -> None:
    result = call("generate", tiny_checkpoint, "fox", "--quantization", "int2")
    assert result.exit_code == 2
    assert "'int8' or 'int4'" in result.stderr


def test_generate_reads_a_file_and_standard_input(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("the quick héllo", encoding="utf-8")
    options = ("--max-new-tokens", "6", "--device", "cpu", "--chunk-size", "3")
    from_file = call("generate", tiny_checkpoint, "--prompt-file", file, *options)
    from_stdin = call("generate", tiny_checkpoint, "-", *options, stdin="the quick héllo")
    from_argument = call("generate", tiny_checkpoint, "the quick héllo", *options)
    assert from_file.exit_code == from_stdin.exit_code == 0
    assert from_file.stdout == from_stdin.stdout == from_argument.stdout


def test_generate_names_what_is_not_utf8(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    from_file = call("generate", tiny_checkpoint, "--prompt-file", tmp_path / "latin.txt")
    from_stdin = CliRunner().invoke(mambalm_cli.app, ["generate", str(tiny_checkpoint), "-"], input=b"\xe9")
    for result, name in ((from_file, "latin.txt"), (from_stdin, "standard input")):
        assert result.exit_code == 2
        assert f"{name} is not UTF-8" in result.stderr
        assert "iconv" in result.stderr


def test_generate_continues_several_prompts_as_each_alone(tiny_checkpoint: Path) -> None:
    options = ("--max-new-tokens", "6", "--temperature", "1.5", "--seed", "4", "--device", "cpu")
    alone = call("generate", tiny_checkpoint, "def sort(", *options).stdout
    both = call("generate", tiny_checkpoint, "def sort(", "fox", *options).stdout
    assert both.startswith(f"--- 1\n{alone}--- 2\n")


def test_generate_writes_copies_that_differ_by_their_seeds(tiny_checkpoint: Path) -> None:
    options = ("--max-new-tokens", "6", "--temperature", "1.5", "--device", "cpu")
    alone = [call("generate", tiny_checkpoint, "fox", "--seed", seed, *options).stdout for seed in ("4", "5")]
    both = call("generate", tiny_checkpoint, "fox", "--seed", "4", "--copies", "2", *options).stdout
    assert both == f"--- 1\n{alone[0]}--- 2\n{alone[1]}"


def test_generate_by_beams(
    tiny_checkpoint: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    options = ("--max-new-tokens", "6", "--device", "cpu", "--beams", "3")
    ids = tiny_tokenizer("def sort(", return_tensors="pt")["input_ids"]
    expected = tiny_model.generate(ids, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False)
    texts = tiny_tokenizer.batch_decode(expected[:, ids.shape[1] :], skip_special_tokens=True)
    assert call("generate", tiny_checkpoint, "def sort(", *options).stdout == texts[0] + "\n"
    both = call("generate", tiny_checkpoint, "def sort(", "--copies", "2", *options).stdout
    assert all(text in both for text in texts)


def test_generate_with_logprobs_writes_a_line_of_json_per_token(tiny_checkpoint: Path) -> None:
    options = ("--max-new-tokens", "5", "--device", "cpu")
    lines = call("generate", tiny_checkpoint, "def sort(", "--logprobs", "2", *options).stdout.splitlines()
    tokens = [json.loads(line) for line in lines]
    assert len(tokens) == 5
    for token in tokens:
        assert token["likeliest"][0]["logprob"] == token["logprob"] < 0
        assert len(token["likeliest"]) == 2
    plain = call("generate", tiny_checkpoint, "def sort(", *options).stdout
    assert plain == "".join(token["text"] for token in tokens) + "\n"
    # What could have begun a stop string is no stop string at the end.
    held = tokens[-1]["text"][-1] + "never"
    lines = call("generate", tiny_checkpoint, "def sort(", "--logprobs", "0", "--stop", held, *options).stdout
    assert plain == "".join(json.loads(line)["text"] for line in lines.splitlines()) + "\n"


def test_generate_reads_on_from_what_the_prefix_store_has(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--max-new-tokens", "6", "--device", "cpu", "--chunk-size", "8", "--prefix-store", tmp_path / "store")
    prompts = ("the quick brown fox " * 8, "the quick brown fox " * 8 + "sorted", "def quicksort(")
    plain = call("generate", tiny_checkpoint, *prompts, *options[:-2])
    tokens = [len(load_tokenizer(str(tiny_checkpoint))(prompt)["input_ids"]) for prompt in prompts]
    known = [0, tokens[0] // 8 * 8, 0]
    for repetition in range(2):
        result = call("generate", tiny_checkpoint, *prompts, *options)
        assert result.exit_code == 0, result.output
        assert result.stdout == plain.stdout
        found = tokens if repetition else known
        hits = sum(count > 0 for count in found)
        told = f"prefix store: {sum(found)} of {sum(tokens)} tokens were known, in {hits} of 3 prompts; "
        assert told in result.stderr
        assert ("; 0 states added, 0 removed" in result.stderr) == bool(repetition)
    result = call("generate", tiny_checkpoint, "fox", *options[:-1], tmp_path / "tiny", "--prefix-store-gib", "1e-8")
    assert "; 0 states added, 0 removed, 1 were larger than the bound" in result.stderr


def test_generate_keeps_what_was_written_before_ctrl_c(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Iterator[tuple[Token, str]]:
        yield Token(0, 5), "some"
        raise KeyboardInterrupt

    monkeypatch.setattr("mambalm.cli.generate.generate_with_tokens", interrupted)
    for prompts, written in ((["fox"], "some\n"), (["fox", "def"], "--- 1\nsome\n--- 2\n\n")):
        result = call("generate", tiny_checkpoint, *prompts, "--device", "cpu")
        assert result.exit_code == 130
        assert result.stdout == written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--beams", "2", "--temperature", "1"), "--beams goes with none of"),
        (("--beams", "2", "--copies", "3"), "--copies asks for 3"),
        (("--beams", "2", "--prefix-store", "x"), "--state, --prefix-store: leave it out"),
        (("--prefix-store", __file__), "is a file: name a folder"),
        (("--prefix-store", "x", "--prefix-store-gib", "0"), "must hold at least one state"),
    ],
)
def test_generate_refuses_options_that_do_not_go_together(
    tiny_checkpoint: Path, options: tuple[str, ...], message: str
) -> None:
    result = call("generate", tiny_checkpoint, "fox", "--device", "cpu", *options)
    assert result.exit_code != 0
    assert message in result.stderr


def test_generate_stops_at_a_string(tiny_checkpoint: Path) -> None:
    options = ("--max-new-tokens", "20", "--device", "cpu")
    free = call("generate", tiny_checkpoint, "def sort(", *options).stdout
    stop = free[4:6]
    assert (
        call("generate", tiny_checkpoint, "def sort(", "--stop", stop, *options).stdout
        == free[: free.index(stop)] + "\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder", "hello"], "no/such/folder"),
        (["{checkpoint}"], "no prompt; give one as in"),
        (["{checkpoint}", "--prompt-file", "missing.txt"], "missing.txt does not exist: check the name"),
        (["{checkpoint}", "--prompt-file", "{empty}"], "is a folder: name a file"),
        (["no/such/model", "hello", "--max-new-tokens", "0"], "max_new_tokens is 0; it must be at least 1"),
        (["no/such/model", "hello", "--state", "missing.state"], "missing.state is no state file"),
        (["{checkpoint}", ""], "prompt 1 has no tokens"),
        (["{checkpoint}", "hello", "--dtype", "int8"], "int8 and int4 weights are of --quantization"),
        (["{checkpoint}", "hello", "--device", "nowhere"], "unknown device 'nowhere'"),
        (["{checkpoint}", "hello", "--top-p", "2"], "top_p is 2.0; it must be"),
        (["{checkpoint}", "hello", "--tokenizer", "{empty}"], "has no tokenizer that transformers can load"),
        (["{checkpoint}", "hello", "--beams", "0"], "--beams is 0; it must be at least 1"),
        (["{checkpoint}", "hello", "--logprobs", "999"], "of a vocabulary of"),
        (["", "hello"], "the model's name is empty"),
    ],
)
def test_generate_tells_an_error_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [argument.format(checkpoint=tiny_checkpoint, empty=tmp_path) for argument in arguments]
    result = call("generate", *filled)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("mambalm generate: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("datatrove.pipeline", "datatrove is not installed: pip install 'mambalm[train]'"),
        ("torchao", "torchao is not installed: pip install 'mambalm[quant]'"),
        ("lm_eval", "lm-eval is not installed: pip install 'mambalm[eval]'"),
        ("nowhere", "No module named 'nowhere'"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, message: str
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(mambalm_cli, "import_module", fail)
    result = call("doctor")
    assert result.exit_code == 2
    assert result.stderr == f"mambalm doctor: {message}\n"


def test_debug_keeps_the_traceback() -> None:
    result = call("--debug", "generate", "no/such/folder", "hello")
    assert isinstance(result.exception, ValueError)


def test_an_unknown_command_or_option_is_refused() -> None:
    assert call("generat").exit_code == 2
    assert "No such option" in call("doctor", "--no-such-option").output


def test_doctor(tiny_checkpoint: Path) -> None:
    result = call("doctor")
    assert result.exit_code == 0
    for word in ("transformers", "C compiler", "selective_scan", "chosen"):
        assert word in result.output


def test_verify_on_a_checkpoint(tiny_checkpoint: Path) -> None:
    result = call("verify", tiny_checkpoint, "--device", "cpu", "--length", "12")
    assert result.exit_code == 0, result.output
    assert result.output.count("equal") >= 6
    assert "not built" in result.output
    assert "FAILED" not in result.output


def test_verify_exits_with_1_when_a_form_fails(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [Check("packed", "logits", error=0.5, allowed=1e-5, worst="document 1")]
    monkeypatch.setattr("mambalm.cli.verify.run_checks", lambda *_, **__: failed)
    result = call("verify", tiny_checkpoint, "--device", "cpu")
    assert result.exit_code == 1
    assert "FAILED" in result.output
