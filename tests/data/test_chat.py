"""Conversations: exactly what the assistant says is learned, whatever the template; packs hold them whole."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mambalm.data.chat import ChatError, encode_conversation
from mambalm.data.inputs import InputError
from mambalm.data.mixture import Mixture, Source, open_stream
from mambalm.data.samples import IGNORED

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}Q: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
# What some templates do with the thoughts of earlier turns.
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: {% if loop.last %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": "wörld?"},
    {"role": "assistant", "content": "yes, the quick fox"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "def x"},
]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML, ["yes, the quick fox<|im_end|>\n", "def x<|im_end|>\n"]),
        (MARKED, ["yes, the quick fox<end>", "def x<end>"]),
    ],
)
def test_exactly_the_assistant_is_learned(
    template: str, said: list[str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_template(tiny_tokenizer, template)
    ids, learned = encode_conversation(tokenizer, TALK)
    assert tokenizer.decode(ids.tolist()) == tokenizer.apply_chat_template(TALK, tokenize=False)
    edges = [0, *(torch.tensor(learned).int().diff().nonzero().flatten() + 1).tolist(), len(ids)]
    runs = [ids[i:j].tolist() for i, j in itertools.pairwise(edges) if learned[i]]
    assert [tokenizer.decode(run) for run in runs] == said


def test_what_cannot_be_told_apart_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ChatError, match=r"renders message 2 differently when others follow.*\{% generation %\}"):
        encode_conversation(with_template(tiny_tokenizer, FORGETFUL), TALK)
    tokenizer = with_template(tiny_tokenizer, CHATML)
    for messages, message in (
        ([], "a conversation is a list"),
        ("hello", "a conversation is a list"),
        ([{"role": "user"}], "needs role and content"),
        (TALK[:2], "no message is the assistant's"),
    ):
        with pytest.raises(ChatError, match=message):
            encode_conversation(tokenizer, messages)  # type: ignore[arg-type]


def chats(path: Path, count: int) -> Source:
    talks = [
        [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "x" * (i % 23)}] for i in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return Source(str(path), kind="chat")


def test_conversations_are_packed_whole(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, MARKED)
    source = chats(tmp_path / "a.jsonl", 40)
    length = 60
    stream = open_stream(Mixture([source]), length=length, tokenizer=tokenizer)
    found = []
    for i in range(len(stream)):
        sample = stream[i]
        assert sample.inputs.numel() == sample.targets.numel() == length
        assert sample.cu_seqlens is not None
        bounds = sample.cu_seqlens.tolist()
        assert (bounds[0], bounds[-1]) == (0, length)
        for begin, end in itertools.pairwise(bounds):
            inputs, targets = sample.inputs[begin:end], sample.targets[begin:end]
            if (targets == IGNORED).all():
                assert end == length
                assert not inputs.any()
                continue
            learned = targets != IGNORED
            assert torch.equal(targets[:-1][learned[:-1]], inputs[1:][learned[:-1]])
            whole = [*inputs.tolist(), int(targets[-1])]
            found.append(tokenizer.decode(whole))
            # Up to and with "A: " nothing, from there on all.
            assert found[-1].split("A: ")[1] == tokenizer.decode(targets[learned].tolist())
    expected = [f"Q: {i}\nA: {'x' * (i % 23)}<end>" for i in range(40)]
    assert sorted(found) == sorted(expected)
    assert [s.inputs.tolist() for s in map(stream.__getitem__, range(len(stream)))] != [
        s.inputs.tolist() for s in map(stream.__getitem__, range(len(stream), 2 * len(stream)))
    ]


def test_long_conversations_are_cut_with_a_word(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    source = chats(tmp_path / "a.jsonl", 23)
    with pytest.warns(UserWarning, match=r"\d+ conversations are longer than 12, and are cut"):
        stream = open_stream(Mixture([source]), length=12, tokenizer=with_template(tiny_tokenizer, MARKED))
    assert all(stream[i].inputs.numel() == 12 for i in range(len(stream)))


def test_tokenised_chats_read_the_same(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("datatrove")
    from mambalm.data.inputs import Reading
    from mambalm.data.tokenization import Tokenization, tokenize

    tokenizer = with_template(tiny_tokenizer, MARKED)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = chats(tmp_path / "a.jsonl", 40)
    reading = Reading(text_field="messages")
    task = Tokenization((source.path,), tmp_path / "out", str(tmp_path / "tokenizer"), reading, chat=True)
    tokenize(task, workers=1)
    direct = open_stream(Mixture([source]), length=60, tokenizer=tokenizer)
    kept = open_stream(Mixture([Source(str(tmp_path / "out"), kind="chat")]), length=60, tokenizer=tokenizer)
    assert len(direct) == len(kept)

    def sequences(stream: object) -> list[tuple[list[int], list[int]]]:
        samples = [stream[i] for i in range(len(direct))]  # type: ignore[index]
        return sorted((sample.inputs.tolist(), sample.targets.tolist()) for sample in samples)

    assert sequences(direct) == sequences(kept)


def test_a_bad_conversation_is_named(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    source = chats(tmp_path / "a.jsonl", 2)
    with Path(source.path).open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "?"}]}\n')
    with pytest.raises(InputError, match=r"a.jsonl, line 3: no message is the assistant's"):
        open_stream(Mixture([source]), length=60, tokenizer=with_template(tiny_tokenizer, MARKED))
    with pytest.raises(ChatError, match="has no chat template"):
        open_stream(Mixture([source]), length=60, tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match="give a tokenizer"):
        open_stream(Mixture([source]), length=60, tokenizer=None)
