"""The loss on held-out sequences, in nats per token and in bits per byte."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mambalm.data.samples import IGNORED, SampleStream, collate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The bytes of text that every token stands for, int64 (tokens); special tokens stand for none."""
    ids = range(len(tokenizer))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
    if "ByteLevel" in json.dumps(decoder):
        # One character of a token's name for each byte: a token may be a part of a character.
        lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]
    else:
        lengths = [len(str(tokenizer.decode([token])).encode()) for token in ids]
    counts = torch.tensor(lengths)
    counts[torch.tensor(tokenizer.all_special_ids, dtype=torch.int64)] = 0
    return counts


@dataclass
class HeldOut:
    """Held-out sequences and how they are read.

    Attributes:
        stream: where they come from.
        sequences: how many are read, the first ones; never more than there are.
        micro_batch: how many at once.
        bytes_of: by token; None: bits per byte are not reported.
        compute: the context of the forward.

    Every rank reads them all, since sharded parameters are there only where all ranks compute.
    """

    stream: SampleStream
    sequences: int
    micro_batch: int
    bytes_of: Tensor | None
    compute: Callable[[], AbstractContextManager]

    @torch.no_grad()
    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """The mean loss of the predicted tokens and, with ``bytes_of``, bits per byte of their text."""
        was_training = model.training
        model.eval()
        nats = torch.zeros((), dtype=torch.float64, device=device)
        count, tokens, size = min(self.sequences, len(self.stream)), 0, 0
        for first in range(0, count, self.micro_batch):
            batch = collate([self.stream[i] for i in range(first, min(first + self.micro_batch, count))])
            learned = batch.targets[batch.targets != IGNORED]
            tokens += learned.numel()
            size += 0 if self.bytes_of is None else int(self.bytes_of[learned].sum())
            with self.compute():
                nats += sum_loss(model, batch, device).double()
        model.train(was_training)
        result = {"held_out/loss": nats.item() / max(tokens, 1)}
        if size:
            result["held_out/bits_per_byte"] = nats.item() / math.log(2) / size
        return result


def sum_loss(
    model: nn.Module, batch: Any, device: torch.device, divisor: float | Tensor = 1.0, z_loss: float = 0.0
) -> Tensor:
    """The summed loss of a batch's targets over ``divisor``; logits of all tokens are never held at once."""
    offsets = batch.cu_seqlens
    return model(
        batch.inputs.to(device, non_blocking=True),
        targets=batch.targets.to(device, non_blocking=True),
        cu_seqlens=None if offsets is None else offsets.to(device, non_blocking=True),
        num_items_in_batch=divisor,
        skip_logits=True,
        use_cache=False,
        z_loss=z_loss,
    ).loss
