"""What is measured: a model of mambalm's or of transformers', behind one interface that reads and writes tokens."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambalm.generation import Engine, Settings, read
from mambalm.generation.reading import chosen_chunk_size
from mambalm.layers.state import State
from mambalm.models.loading import FAMILIES, load, locate
from mambalm.models.quiet import without_bars
from mambalm.models.shapes import random_model, shape, similar_transformer

Heard = Callable[[list[int]], None]


class Run(ABC):
    """A batch of rows on its way: what a model has read, and where.

    Attributes:
        position: tokens that each row has read.
    """

    def __init__(self, subject: Subject, batch: int) -> None:
        self.subject, self.batch, self.position = subject, batch, 0

    def read(self, count: int, chunk_size: int | None = None) -> None:
        """Read that many random tokens per row, so many at once; None: all of them."""
        left, generator = count, torch.Generator().manual_seed(self.position)
        while left:
            size = min(left, chunk_size or left)
            ids = torch.randint(self.subject.vocabulary, (self.batch, size), generator=generator)
            self._read(ids.to(self.subject.device))
            self.position += size
            left -= size

    @abstractmethod
    def _read(self, ids: Tensor) -> None:
        """Read (b, l) tokens in one call."""

    @abstractmethod
    def write(self, count: int) -> Iterator[None]:
        """Write the likeliest tokens, and read each: an item per token; the device may still be at work on it."""


class Subject(ABC):
    """A model to measure.

    Attributes:
        name: what the user calls it.
        model: the model, in eval mode.
        reads_in_chunks: whether a prompt can be read in pieces.
        is_recurrent: whether it has a state of fixed size, and no cache that grows.
        chunk_size: tokens of a prompt to read at once where nothing else is asked for.
    """

    reads_in_chunks = True
    chunk_size = 2048
    is_recurrent = True

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.model.config.vocab_size)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def describe(self) -> dict[str, Any]:
        """What the JSON file says of the model."""
        config = self.model.config
        kind = type(self.model)
        return {
            "name": self.name,
            "class": f"{kind.__module__.partition('.')[0]}.{kind.__name__}",
            "parameters": self.parameters,
            "weights_bytes": sum(parameter.nbytes for parameter in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "hidden_size": config.hidden_size,
            "layers": config.num_hidden_layers,
            "vocabulary": self.vocabulary,
        }

    @abstractmethod
    def begin(self, batch: int) -> Run:
        """A run that has read nothing."""

    @abstractmethod
    def read(self, prompts: Tensor) -> None:
        """Read prompts (b, l) as `generate` does, and no more."""

    @abstractmethod
    def generate(self, prompts: Tensor, settings: Settings, heard: Heard) -> None:
        """Continue prompts (b, l) by `max_new_tokens`; `heard` is called with each new token of all rows."""


class _MambalmRun(Run):
    def __init__(self, subject: MambalmSubject, batch: int) -> None:
        super().__init__(subject, batch)
        self._engine = subject.engine
        self._state: State = subject.model.init_state(batch)
        self._logits: Tensor | None = None

    def _read(self, ids: Tensor) -> None:
        # Chunks end at multiples of their size, so that nothing is cut off before this one.
        whole = self.position + ids.shape[1]
        self._logits, self._state = read(self.subject.model, list(ids), self._state, chunk_size=whole)

    def write(self, count: int) -> Iterator[None]:
        assert self._logits is not None, "something was read"
        reader, logits = self._engine.reader(self._state), self._logits
        for _ in range(count):
            logits = reader(logits.argmax(-1))
            self.position += 1
            yield
        # The reader's own logits are overwritten by its next call.
        self._logits, self._state = logits.clone(), reader.state()


class MambalmSubject(Subject):
    """A model of mambalm, run as `mambalm generate` does."""

    def __init__(self, name: str, model: Any) -> None:
        super().__init__(name, model)
        self.engine = Engine(model)
        self.chunk_size = chosen_chunk_size(model)

    def describe(self) -> dict[str, Any]:
        """See `Subject`; and how a step runs."""
        return {**super().describe(), "step": self.engine.explain()}

    def begin(self, batch: int) -> Run:
        """See `Subject`."""
        return _MambalmRun(self, batch)

    def read(self, prompts: Tensor) -> None:
        """See `Subject`."""
        read(self.model, list(prompts), graphs=self.engine.chunks)

    def generate(self, prompts: Tensor, settings: Settings, heard: Heard) -> None:
        """See `Subject`."""
        row = list[int]()
        for token in self.engine.generate(list(prompts), settings):
            row.append(token.id)
            if len(row) == len(prompts):
                heard(row)
                row = []


class _TransformersRun(Run):
    def __init__(self, subject: Subject, batch: int) -> None:
        super().__init__(subject, batch)
        arguments = inspect.signature(subject.model.forward).parameters
        # One name from transformers 5.24 on, before it one for recurrent models and one for the others.
        self._name = next(name for name in ("cache", "cache_params", "past_key_values") if name in arguments)
        self._cache: Any = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def _read(self, ids: Tensor) -> None:
        output = self.subject.model(ids, use_cache=True, logits_to_keep=1, **{self._name: self._cache})
        self._logits, self._cache = output.logits[:, -1], getattr(output, self._name)

    def write(self, count: int) -> Iterator[None]:
        assert self._logits is not None, "something was read"
        for _ in range(count):
            self._read(self._logits.argmax(-1)[:, None])
            self.position += 1
            yield


class TransformersSubject(Subject):
    """Any causal language model of transformers: its own cache, and for single steps no more than its forward pass."""

    def __init__(self, name: str, model: Any) -> None:
        super().__init__(name, model)
        # Stock recurrent models (Mamba, FalconMamba) forget their state when several tokens follow it.
        self.is_recurrent = bool(getattr(model, "_is_stateful", False))
        self.reads_in_chunks = not self.is_recurrent
        model.generation_config.eos_token_id = None

    def describe(self) -> dict[str, Any]:
        """See `Subject`; and which attention runs."""
        attention = getattr(self.model.config, "_attn_implementation", None)
        return {**super().describe(), "attention": None if self.is_recurrent else attention}

    def begin(self, batch: int) -> Run:
        """See `Subject`."""
        return _TransformersRun(self, batch)

    def read(self, prompts: Tensor) -> None:
        """See `Subject`."""
        self.begin(len(prompts))._read(prompts.to(self.device))

    def generate(self, prompts: Tensor, settings: Settings, heard: Heard) -> None:
        """By transformers' own `generate`."""
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Listener(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                row = input_ids[:, -1].tolist()
                heard(row)
                return torch.zeros(len(row), dtype=torch.bool, device=input_ids.device)

        chosen = settings.sampling
        sampled = {"temperature": chosen.temperature, "top_p": chosen.top_p, "min_p": chosen.min_p}
        if isinstance(settings.seed, int):
            torch.manual_seed(settings.seed)
        self.model.generate(
            prompts.to(self.device),
            attention_mask=torch.ones_like(prompts, device=self.device),
            max_new_tokens=settings.max_new_tokens,
            do_sample=chosen.temperature > 0,
            repetition_penalty=chosen.repetition_penalty,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Listener()]),
            **({**sampled, "top_k": chosen.top_k} if chosen.temperature > 0 else {}),
        )


def checkpoint_subject(
    path_or_hub_id: str, dtype: torch.dtype | None, device: torch.device, *, transformers: bool = False
) -> Subject:
    """A checkpoint: in mambalm's class if it has one and `transformers` does not ask for that library's own.

    Raises:
        ValueError: nobody can load it.
    """
    # Asked once here: without a network transformers would ask the Hub for half a minute.
    folder = locate(path_or_hub_id)
    # A model_type of another family is transformers' to load.
    if not transformers and not _is_foreign(folder):
        return MambalmSubject(path_or_hub_id, load(folder, dtype=dtype, device=device))
    from transformers import AutoModelForCausalLM

    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    return TransformersSubject(f"{path_or_hub_id} (transformers)", nn.Module.to(model, device).eval())


def _is_foreign(folder: Path) -> bool:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return False  # no configuration of transformers', or mambalm's own
    return type(config) not in FAMILIES


def random_subject(name: str, dtype: torch.dtype, device: torch.device, *, transformers: bool = False) -> Subject:
    """A published model's shape with random weights.

    Raises:
        ValueError: there is no shape of that name.
    """
    config = shape(name)
    if transformers:
        return TransformersSubject(f"{name} (transformers)", random_model(config, dtype, device, transformers=True))
    return MambalmSubject(name, random_model(config, dtype, device))


def transformer_beside(subject: Subject) -> Subject:
    """transformers' Llama class with random weights, as large as the subject, with its vocabulary, dtype and device."""
    config = similar_transformer(subject.model.config, subject.parameters)
    name = f"Transformer beside {subject.name}"
    return TransformersSubject(name, random_model(config, subject.model.dtype, subject.device))
