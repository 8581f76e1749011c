"""`mambalm chat`: what a user types, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
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
    for message in ("there is nothing to undo", "no command /fly", "/save needs", "missing.state", "/exit", "A new"):
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
