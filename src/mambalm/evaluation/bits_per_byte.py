"""Bits per byte of a text: how small the model, as a compressor, would make it."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mambalm.data.tokenizer import encode_documents
from mambalm.models.common import MambalmForCausalLM


@dataclass(frozen=True)
class CodeLength:
    """The length of a compressed text.

    Attributes:
        bits: what the compressor needs for the whole text.
        nbytes: the size of the text in UTF-8.
    """

    bits: float
    nbytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of the text."""
        return self.bits / self.nbytes


def bits_per_byte(
    model: MambalmForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    *,
    chunk_size: int = 2048,
    on_chunk: Callable[[int, int], None] = lambda done, total: None,
) -> CodeLength:
    """The code length of ``text`` under the model: -log2 of the probability of its tokens, from the first to the last.

    The text is read as one stream in chunks, the state handed on, so that every token is predicted from all before it;
    the first from the beginning-of-text token. The sizes of the model and of the tokenizer are not counted.

    Args:
        model: in eval mode.
        tokenizer: the model's; one that loses nothing.
        text: at least one character.
        chunk_size: tokens read at once; the result does not depend on it.
        on_chunk: told the tokens read so far, and in all.

    Raises:
        ValueError: the text is empty, or the tokenizer does not give it back.
    """
    if not text:
        raise ValueError("bits per byte of an empty text are undefined")
    tokens = torch.from_numpy(encode_documents(tokenizer, [text]))
    if tokenizer.decode(tokens[1:].tolist()) != text:
        raise ValueError("the tokenizer does not give the text back: bits per byte would leave out what it loses")
    bits, done, total = 0.0, 0, len(tokens) - 1
    for chunk in chunk_bits(model, tokens, chunk_size):
        bits += chunk
        done = min(done + chunk_size, total)
        on_chunk(done, total)
    return CodeLength(bits, len(text.encode()))


@torch.no_grad()
def chunk_bits(model: MambalmForCausalLM, tokens: Tensor, chunk_size: int) -> Iterator[float]:
    """Bits of each chunk of ``tokens`` (n + 1), int64; the first token is given, the n after it are predicted."""
    state = model.init_state(1)
    tokens = tokens.to(model.device)
    for start in range(0, len(tokens) - 1, chunk_size):
        targets = tokens[start + 1 : start + 1 + chunk_size]
        output = model(tokens[None, start : start + len(targets)], cache_params=state)
        state = output.cache_params
        yield F.cross_entropy(output.logits[0], targets, reduction="sum").item() / math.log(2)


def compressed(text: str) -> dict[str, CodeLength]:
    """The code length of ``text`` under the strongest settings of xz and gzip."""
    data = text.encode()
    sizes = {"xz -9": lzma.compress(data, preset=9), "gzip -9": gzip.compress(data, compresslevel=9)}
    return {name: CodeLength(8 * len(out), len(data)) for name, out in sizes.items()}
