"""Bits per byte: the sum by hand over single tokens, whatever the chunks."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MambaConfig, PreTrainedTokenizerFast

from mambalm.data.tokenizer import encode_documents, train_tokenizer
from mambalm.evaluation.bits_per_byte import CodeLength, bits_per_byte, compressed
from mambalm.models.mamba import MambaForCausalLM

TEXT = "def f(x):\n    return 'naïve ∀'\n" * 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT], 270)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> MambaForCausalLM:
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config).double().eval()


def test_equals_the_sum_over_every_token(model: MambaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = encode_documents(tokenizer, [TEXT]).tolist()
    bits = 0.0
    with torch.no_grad():
        # Each token from all before it, beginning-of-text included, in a pass of its own.
        for end in range(1, len(tokens)):
            logits = model(torch.tensor([tokens[:end]])).logits[0, -1]
            bits -= torch.log2(logits.double().softmax(0)[tokens[end]]).item()
    found = bits_per_byte(model, tokenizer, TEXT)
    assert found.bits == pytest.approx(bits, rel=1e-5)
    assert found.nbytes == len(TEXT.encode()) > len(TEXT)
    assert found.bits_per_byte == pytest.approx(bits / len(TEXT.encode()), rel=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 10_000])
def test_does_not_depend_on_the_chunks(
    model: MambaForCausalLM, tokenizer: PreTrainedTokenizerFast, chunk_size: int
) -> None:
    seen: list[tuple[int, int]] = []
    whole = bits_per_byte(model, tokenizer, TEXT)
    found = bits_per_byte(
        model, tokenizer, TEXT, chunk_size=chunk_size, on_chunk=lambda done, total: seen.append((done, total))
    )
    assert found.bits == pytest.approx(whole.bits, rel=1e-5)
    total = len(encode_documents(tokenizer, [TEXT])) - 1
    assert seen == [(min(done, total), total) for done in range(chunk_size, total + chunk_size, chunk_size)]


def test_a_model_that_knows_nothing_needs_the_bits_of_its_vocabulary(
    model: MambaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    tokens = len(encode_documents(tokenizer, [TEXT])) - 1
    expected = tokens * math.log2(len(tokenizer))
    assert bits_per_byte(model, tokenizer, TEXT).bits == pytest.approx(expected, rel=1e-5)


def test_what_would_be_measured_wrongly_is_refused(model: MambaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="empty text"):
        bits_per_byte(model, tokenizer, "")
    from tokenizers import normalizers

    lossy = train_tokenizer([TEXT], 270)
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="does not give the text back"):
        bits_per_byte(model, lossy, "Text")


def test_compressors() -> None:
    text = "ab" * 1000
    found = compressed(text)
    assert list(found) == ["xz -9", "gzip -9"]
    assert all(length.nbytes == 2000 and 0 < length.bits_per_byte < 1 for length in found.values())
    assert CodeLength(bits=30.0, nbytes=20).bits_per_byte == 1.5
