"""Conversations: every turn reads what it adds, and is where reading the whole rendered conversation leads."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mambalm.generation import Sampling, Settings
from mambalm.generation.conversation import Conversation
from mambalm.generation.sampling import Choice, Chooser
from mambalm.generation.session import Session
from mambalm.generation.state_file import StateFileError
from tests.helpers import FLOAT32, relative_error

# So hot that the tokens are not those of their text.
SETTINGS = Settings(max_new_tokens=7, sampling=Sampling(temperature=40.0), seed=3)
PLAIN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Strips answers, and rewrites all but the last: what was read before changes.
CHANGING = PLAIN.replace("{{ m.content }}", "{{ (m.content if loop.last else m.content | upper) | trim }}")
REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if messages[-1].content == 'fox' %}{{ raise_exception('no fox') }}{% endif %}" + PLAIN
)


@pytest.fixture(params=["fallback", PLAIN, CHANGING], ids=["fallback", "plain", "changing"])
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return with_template(tiny_tokenizer, None if request.param == "fallback" else request.param)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>")
    made.chat_template = template
    return made


def rendered(conversation: Conversation, tokenizer: PreTrainedTokenizerFast, prompt: bool) -> list[int]:
    template = tokenizer.chat_template or (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    text = tokenizer.apply_chat_template(
        conversation.messages, tokenize=False, add_generation_prompt=prompt, chat_template=template
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def assert_read(session: Session, before: list[int], tokens: list[int]) -> None:
    """The session is where reading all of these at once leads."""
    whole = Session(session.model)
    whole.read(before + tokens)
    assert session.snapshot.digest == whole.snapshot.digest
    assert session.snapshot.logits is not None
    assert whole.snapshot.logits is not None
    assert relative_error(session.snapshot.logits, whole.snapshot.logits) <= FLOAT32
    for one, other in zip(session.snapshot.state.layers, whole.snapshot.state.layers, strict=True):
        assert relative_error(one.ssm, other.ssm) <= FLOAT32
        assert relative_error(one.conv, other.conv) <= FLOAT32


@pytest.mark.parametrize("before", [[], [5, 6, 7]], ids=["fresh", "behind a text"])
def test_every_turn_is_the_whole_conversation(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, before: list[int]
) -> None:
    session = Session(tiny_model, tokenizer)
    session.read(before)
    conversation = Conversation(session, "be brief")
    assert conversation.uses_fallback == (tokenizer.chat_template is None)
    for question in ("sort the numbers", "and the héllo fox?", "again"):
        conversation.ask(question)
        assert_read(session, before, rendered(conversation, tokenizer, True))
        answer = "".join(conversation.answer(SETTINGS))
        assert conversation.messages[-1] == {"role": "assistant", "content": answer}
        assert tokenizer(answer, add_special_tokens=False)["input_ids"] != session.written
    assert conversation.undo() == "again"
    conversation.ask("something else")
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert_read(session, before, rendered(conversation, tokenizer, True))


def test_without_a_ladder_the_conversation_goes_back_to_its_beginning(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_template(tiny_tokenizer, CHANGING)
    session = Session(tiny_model, tokenizer, rungs=0)
    session.read([5, 6, 7])
    conversation = Conversation(session)
    for question in ("sort the numbers", "fox"):
        conversation.ask(question)
        list(conversation.answer(SETTINGS))
    conversation.undo()
    conversation.ask("the quick brown")
    assert_read(session, [5, 6, 7], rendered(conversation, tokenizer, True))


def test_the_tokenizers_end_ends_an_answer(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_template(tiny_tokenizer, PLAIN)
    script = iter(tokenizer("fine<end>more")["input_ids"])
    monkeypatch.setattr(Chooser, "__call__", lambda *_: Choice(torch.tensor([next(script)])))
    conversation = Conversation(Session(tiny_model, tokenizer))
    conversation.ask("how are you?")
    assert "".join(conversation.answer(Settings(max_new_tokens=40))) == "fine"


def test_a_turn_reads_only_what_it_adds(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, PLAIN)
    conversation = Conversation(Session(tiny_model, tokenizer))
    first = conversation.ask("the quick brown fox " * 20)
    # Whose tokens are those of its text.
    answer = "".join(conversation.answer(Settings(max_new_tokens=7)))
    second = conversation.ask("fox")
    turn = f"[assistant] {answer}<end>[user] fox<end>[assistant] "
    assert first > 60
    assert second <= len(tokenizer(turn)["input_ids"])


def test_an_answer_broken_off_stays_as_far_as_it_came(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    session = Session(tiny_model, tokenizer)
    conversation = Conversation(session)
    conversation.ask("def quicksort")
    answer = conversation.answer(SETTINGS)
    said = next(answer) + next(answer)
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    conversation.ask("go on")
    assert_read(session, [], rendered(conversation, tokenizer, True))


def test_the_fallback_ends_where_the_message_ends(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_template(tiny_tokenizer, None)
    script = iter(tokenizer("fine<|im_end|>more")["input_ids"])
    monkeypatch.setattr(Chooser, "__call__", lambda *_: Choice(torch.tensor([next(script)])))
    session = Session(tiny_model, tokenizer)
    conversation = Conversation(session)
    conversation.ask("how are you?")
    assert "".join(conversation.answer(Settings(max_new_tokens=40))) == "fine"
    conversation.ask("good")
    assert_read(session, [], rendered(conversation, tokenizer, True))


def test_saved_and_loaded(tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    session = Session(tiny_model, tokenizer)
    conversation = Conversation(session, "be brief")
    for question in ("fox", "numbers"):
        conversation.ask(question)
        list(conversation.answer(SETTINGS))
    conversation.save(tmp_path / "a.state")
    assert_read(session, [], rendered(conversation, tokenizer, False))
    other = Session(tiny_model, tokenizer)
    loaded = Conversation.load(other, tmp_path / "a.state")
    assert loaded.messages == conversation.messages
    for talk in (conversation, loaded):
        talk.ask("and then?")
    assert_read(other, [], rendered(conversation, tokenizer, True))
    assert list(loaded.answer(SETTINGS)) == list(conversation.answer(SETTINGS))
    # Undone beyond what the file holds a state of: read again from the beginning.
    for question in ("and then?", "numbers", "fox"):
        assert loaded.undo() == question
    loaded.ask("hello")
    assert_read(other, [], rendered(loaded, tokenizer, True))


def test_saved_between_question_and_answer(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    conversation = Conversation(Session(tiny_model, tokenizer))
    conversation.ask("fox")
    conversation.save(tmp_path / "a.state")
    loaded = Conversation.load(Session(tiny_model, tokenizer), tmp_path / "a.state")
    assert list(loaded.answer(SETTINGS)) == list(conversation.answer(SETTINGS))


def test_loaded_behind_a_text(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer = with_template(tiny_tokenizer, PLAIN)
    session = Session(tiny_model, tokenizer)
    session.read([5, 6, 7])
    session.save(tmp_path / "book.state")
    conversation = Conversation.load(session, tmp_path / "book.state")
    assert conversation.messages == []
    conversation.ask("fox")
    list(conversation.answer(SETTINGS))
    conversation.save(tmp_path / "talk.state")
    loaded = Conversation.load(Session(tiny_model, tokenizer), tmp_path / "talk.state")
    loaded.undo()
    with pytest.raises(ValueError, match="load an earlier file"):
        loaded.ask("numbers")
    with pytest.raises(StateFileError, match="was saved with another chat template"):
        Conversation.load(Session(tiny_model, with_template(tokenizer, CHANGING + " ")), tmp_path / "talk.state")


def test_a_question_that_cannot_be_read_changes_nothing(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_template(copy.deepcopy(tiny_tokenizer), CHANGING)
    tokenizer.add_tokens(["<unknown>"])
    session = Session(tiny_model, tokenizer, chunk_size=8)
    conversation = Conversation(session)
    conversation.ask("sort the numbers")
    list(conversation.answer(SETTINGS))
    with pytest.raises(ValueError, match="the model's vocabulary has 300"):
        conversation.ask("the quick brown fox <unknown>")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    conversation.ask("the fox")
    assert_read(session, [], rendered(conversation, tokenizer, True))


def test_what_the_template_refuses_is_told(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    session = Session(tiny_model, with_template(tiny_tokenizer, REFUSING))
    refusal = "the model's chat template refuses these messages: no "
    with pytest.raises(ValueError, match=refusal + "system role"):
        Conversation(session, "be brief")
    conversation = Conversation(session)
    with pytest.raises(ValueError, match=refusal + "fox"):
        conversation.ask("fox")
    assert not conversation.messages
    conversation.ask("hound")
    with pytest.raises(ValueError, match=refusal + "system role"):
        conversation.restart("be brief")
    assert conversation.undo() == "hound"
    with pytest.raises(ValueError, match="nothing to undo"):
        conversation.undo()
    with pytest.raises(ValueError, match="nothing to answer"):
        list(conversation.answer(SETTINGS))
    with pytest.raises(ValueError, match="has no tokenizer"):
        Conversation(Session(tiny_model))
