"""`mambalm chat`: what a user types, and what comes of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import mambalm_cli
from mambalm.generation import Sampling, Settings, end_tokens
from mambalm.generation.conversation import Conversation
from mambalm.generation.session import Session

OPTIONS = ("--device", "cpu", "--max-new-tokens", "6", "--seed", "2")
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<end>{% endfor %}[assistant] "


def chat(checkpoint: Path, *lines: str, options: tuple[str, ...] = ()) -> Result:
    arguments = ["chat", str(checkpoint), *OPTIONS, *options]
    return CliRunner().invoke(mambalm_cli.app, arguments, input="\n".join(lines) + "\n")


@pytest.fixture
def answers(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Conversation:
    return Conversation(Session(tiny_model, tiny_tokenizer), "be brief")


def answer(conversation: Conversation, question: str) -> str:
    conversation.ask(question)
    settings = Settings(
        sampling=Sampling(temperature=0.7, top_p=0.95), max_new_tokens=6, seed=2, end_tokens=frozenset({0})
    )
    return "".join(conversation.answer(settings))


def test_a_conversation(tiny_checkpoint: Path, answers: Conversation, tmp_path: Path) -> None:
    file = tmp_path / "talk.state"
    lines = ("the fox", "/undo", "sort numbers", f"/save {file}", "/exit", "never said")
    result = chat(tiny_checkpoint, *lines, options=("--system", "be brief"))
    assert result.exit_code == 0, result.output
    first = answer(answers, "the fox")
    answers.undo()
    second = answer(answers, "sort numbers")
    assert result.stdout == f"{first}\n{second}\n"
    assert "has no chat template: using Falcon's ChatML form" in result.stderr
    assert "Taken back: the fox" in result.stderr
    assert result.stderr.count("tokens/s), wrote") == 2
    third = answer(answers, "and then?")
    for options, loading in ((("--state", str(file)), ()), ((), (f"/load {file}",))):
        again = chat(tiny_checkpoint, *loading, "and then?", options=options)
        assert again.exit_code == 0, again.output
        assert again.stdout == f"{third}\n"


def test_what_cannot_be_done_is_told_and_the_conversation_goes_on(
    tiny_checkpoint: Path, answers: Conversation, tmp_path: Path
) -> None:
    wrong = ("/undo", "/fly", "/save", f"/load {tmp_path / 'missing.state'}")
    result = chat(tiny_checkpoint, *wrong, "/help", "", "/system be brief", "the fox")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{answer(answers, 'the fox')}\n"
    told = ("there is nothing to undo", "no command /fly", "/save needs", "missing.state is no state file: name one")
    for message in (*told, "/exit", "A new"):
        assert message in result.stderr


def test_ctrl_c_ends_an_answer_and_no_more(
    tiny_checkpoint: Path, answers: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Session.write_text

    def interrupted(self: Session, *arguments: Any) -> Iterator[str]:
        monkeypatch.setattr(Session, "write_text", write)
        yield next(write(self, *arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "write_text", interrupted)
    result = chat(tiny_checkpoint, "the fox", "/undo", "sort numbers", options=("--system", "be brief"))
    assert result.exit_code == 0, result.output
    assert "Interrupted." in result.stderr
    assert result.stdout.splitlines()[-1] == answer(answers, "sort numbers").splitlines()[-1]


def test_ctrl_c_twice_leaves(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def typed(*lines: str | None) -> Callable[[], str]:
        waiting = iter(lines)

        def line() -> str:
            text = next(waiting)
            if text is None:
                raise KeyboardInterrupt
            return text

        return line

    for lines, answers in (((None, "the fox", None, None, "never asked"), 1), ((None, None, "never asked"), 0)):
        monkeypatch.setattr("mambalm.cli.chat._typed", typed(*lines))
        result = chat(tiny_checkpoint)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("tokens/s), wrote") == answers
        assert "Ctrl-C once more, Ctrl-D or /exit leaves." in result.stderr


def test_a_prefix_store_remembers_across_conversations(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--system", "be brief", "--prefix-store", str(tmp_path / "store"))
    plain = chat(tiny_checkpoint, "the fox", "sort numbers", options=options[:2])
    first = chat(tiny_checkpoint, "the fox", "sort numbers", options=options)
    again = chat(tiny_checkpoint, "the fox", "sort numbers", options=options)
    assert first.stdout == again.stdout == plain.stdout
    assert "in the prefix store" not in first.stderr
    assert re.findall(r"read 0 tokens \(0.0 tokens/s\), had \d+ in the prefix store", again.stderr)
    # Another question behind the same system prompt.
    other = chat(tiny_checkpoint, "a hound", options=options)
    assert re.search(r"read \d+ tokens .*, had \d+ in the prefix store", other.stderr)


def test_a_template_without_a_system_prompt_refuses_it(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<end>")
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    tiny_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = chat(tmp_path, "the fox", options=("--system", "be brief"))
    assert result.exit_code == 2
    assert result.stderr == "mambalm chat: the model's chat template refuses these messages: no system\n"
    result = chat(tmp_path, "/system be brief", "the fox")
    assert "refuses these messages" in result.stderr
    assert "wrote" in result.stderr


def test_the_models_own_template_is_used_without_a_word(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tiny_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = chat(tmp_path, "the fox")
    assert result.stdout == f"{answer(Conversation(Session(tiny_model, tokenizer)), 'the fox')}\n"
    assert "template" not in result.stderr
    assert end_tokens(tiny_model) == frozenset({0})


def test_a_system_prompt_and_a_state_exclude_each_other(tiny_checkpoint: Path) -> None:
    result = chat(tiny_checkpoint, options=("--system", "be brief", "--state", "a.state"))
    assert result.exit_code == 2
    assert "give one of them" in result.stderr
    result = chat(Path("no/model"), options=("--state", "a.state"))
    assert "a.state is no state file" in result.stderr
