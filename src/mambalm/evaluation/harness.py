"""mambalm's models in EleutherAI's lm-evaluation-harness, by which the field scores language models.

Importing this module registers `HarnessModel` there as "mambalm". It needs the package `lm-eval`, of the extra `eval`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from rich.console import Console

from mambalm.data.tokenizer import load_tokenizer
from mambalm.evaluation.likelihood import likelihoods
from mambalm.evaluation.shared_prefixes import Rows, Tokens, shared_batches
from mambalm.generation import Engine, Sampling, Settings, TextStream, end_tokens
from mambalm.generation.reading import read
from mambalm.models.common import MambalmForCausalLM
from mambalm.models.loading import default_device, load
from mambalm.training.progress import ProgressBar

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
# What the harness calls the most tokens to write, each backend in its own way.
_MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


@register_model("mambalm")
class HarnessModel(TemplateLM):
    """A model as the harness asks it.

    What several prompts begin with, as the examples before a question, is read once and its state handed on. Prompts
    and documents of any length are read whole: nothing is cut off, and a document's perplexity has all of it for
    context. Generation ends where a stop string or an end token comes.
    """

    def __init__(
        self,
        pretrained: str | MambalmForCausalLM,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        dtype: str | None = None,
        device: str | torch.device | None = None,
        quantization: str | None = None,
        batch_size: int | str = 32,
        max_gen_toks: int = 256,
        seed: int = 0,
    ) -> None:
        """Load a model, or take one that is.

        Args:
            pretrained: a model, or what `mambalm.load` takes.
            tokenizer: one, or its folder or repository; None: that of ``pretrained``.
            dtype: see `mambalm.load`.
            device: where the model goes; None: the accelerator if there is one, else the CPU.
            quantization: see `mambalm.load`.
            batch_size: rows that are read at once at most.
            max_gen_toks: tokens to write where a task does not say.
            seed: where a task samples, its request i draws by `seed + i`.

        Raises:
            ValueError: an option that is not available, or no tokenizer to a model that was loaded before.
        """
        super().__init__()
        if not isinstance(pretrained, str):
            if tokenizer is None:
                raise ValueError("a model that is loaded comes with its tokenizer: pass tokenizer, too")
            self.model = pretrained
        else:
            self.model = load(pretrained, dtype, device or default_device(), quantization)
            tokenizer = tokenizer or pretrained
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.engine = Engine(self.model)
        self._device = self.model.device
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"batch_size is {batch_size!r}: give a number of rows, at least 1")
        self.batch_size = int(batch_size)
        self.max_gen_toks, self.seed = int(max_gen_toks), int(seed)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ends = (self.tokenizer.eos_token_id, *sorted(end_tokens(self.model)))
        found = next((token for token in ends if token is not None), None)
        if found is None:
            raise ValueError("neither the tokenizer nor the model names an end-of-text token: set eos_token_id")
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells its caches of requests apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The token ids of a text, with the special tokens that the tokenizer puts around it.

        A text that begins with the beginning-of-text token, as one of a chat template, is not given a second.
        """
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood, in nats, of whole texts behind the prefix token."""
        texts = [request.args[0] for request in requests]
        pairs = [((self.prefix_token_id,), tuple(self.tok_encode(text, add_special_tokens=False))) for text in texts]
        # An empty text is certain.
        found = [0.0] * len(texts)
        some = [index for index, (_, tokens) in enumerate(pairs) if tokens]
        scored = likelihoods(self.engine, [pairs[index] for index in some], self.batch_size)
        for number, likelihood in _shown(scored, len(some), "loglikelihood_rolling", disable_tqdm):
            index = some[number]
            found[index] = likelihood.logprob
            self.cache_hook.add_partial("loglikelihood_rolling", (texts[index],), likelihood.logprob)
        return found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found = [(0.0, False)] * len(pairs)
        scored = likelihoods(self.engine, pairs, self.batch_size)
        for index, likelihood in _shown(scored, len(pairs), "loglikelihood", disable_tqdm):
            found[index] = (likelihood.logprob, likelihood.is_greedy)
            self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, each up to a stop string, an end token or its most tokens.

        Raises:
            ValueError: a request asks for what mambalm's sampling does not have.
        """
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        found = [""] * len(requests)
        written = (pair for indices in alike.values() for pair in self._continue(requests, indices))
        for index, text in _shown(written, len(requests), "generate_until", disable_tqdm):
            found[index] = text
            self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return found

    def _continue(self, requests: Sequence[Instance], indices: Sequence[int]) -> Iterator[tuple[int, str]]:
        """(index, text) of the requests with these indices, which are to be continued in one way."""
        begin = [self.prefix_token_id]
        prompts = [tuple(self.tok_encode(requests[index].args[0]) or begin) for index in indices]
        settings, stop = self._settings(requests[indices[0]].args[1])
        for rows in shared_batches(self.engine, prompts, self.batch_size):
            here = replace(settings, seed=[self.seed + indices[number] for number in rows.numbers])
            streams = [TextStream(self.tokenizer, prompts[number], stop) for number in rows.numbers]
            texts = [""] * len(streams)
            for row, token in self._tokens(rows, prompts, here, streams):
                texts[row] += streams[row].push(token)
            for number, text, stream in zip(rows.numbers, texts, streams, strict=True):
                yield indices[number], text + stream.flush()

    def _tokens(
        self, rows: Rows, prompts: Sequence[Tokens], settings: Settings, streams: Sequence[TextStream]
    ) -> Iterator[tuple[int, int]]:
        """(row, token) of what is written behind the prompts of some rows, less the tokens that end them."""
        logits, state = read(self.model, rows.rests, rows.state, graphs=self.engine.chunks)
        seen = None
        if settings.sampling.penalizes:
            # All of a prompt counts, the part that others share too.
            seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for row, number in enumerate(rows.numbers):
                seen[row, list(prompts[number])] = True
        chooser = self.engine.chooser(len(logits), settings, seen)
        for token in self.engine.go_on(logits, state, chooser, settings, lambda row: streams[row].stopped):
            if token.id not in settings.end_tokens:
                yield token.row, token.id

    def _settings(self, wanted: Mapping[str, Any]) -> tuple[Settings, tuple[str, ...]]:
        """How to continue, and the stop strings, by a task's words for it."""
        rest = {name: value for name, value in wanted.items() if value is not None}
        stop = rest.pop("until", ())
        lengths = [rest.pop(name) for name in _MOST_TOKENS if name in rest]
        draws = rest.pop("do_sample", rest.get("temperature", 0) > 0)
        temperature = float(rest.pop("temperature", 1)) if draws else 0.0
        rest.pop("temperature", None)
        chosen = {name: rest.pop(name) for name in _SAMPLING if name in rest}
        if rest:
            raise ValueError(
                f"mambalm has no {', '.join(sorted(rest))} to generate with: a task may ask for until, do_sample, "
                f"temperature, {', '.join((*_SAMPLING, *_MOST_TOKENS))}"
            )
        settings = Settings(
            sampling=Sampling(temperature=temperature, **chosen),
            max_new_tokens=int(lengths[0]) if lengths else self.max_gen_toks,
            end_tokens=end_tokens(self.model) | {self.eot_token_id},
        )
        return settings, tuple(text for text in ((stop,) if isinstance(stop, str) else stop) if text)


def _shown(found: Iterator[_T], total: int, what: str, hidden: bool) -> Iterator[_T]:
    """The same, with a bar."""
    with ProgressBar(Console(stderr=True, quiet=hidden), f"mambalm, {what}") as bar:
        for done, one in enumerate(found, 1):
            yield one
            bar.update(done / total, f"{done:,} of {total:,}")
