"""Which model, tokenizer and device a state belongs to, in a few hundred kilobytes that can say what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mambalm.models.common import MambalmForCausalLM

SAMPLES = 64
# Fields of a configuration that change no logits of a model whose weights are there.
_WITHOUT_EFFECT = {
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "pad_vocab_size_multiple",
    "rescale_prenorm_residual",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_max",
    "time_step_min",
    "time_step_scale",
    "use_associative_scan",
    "use_cache",
    "use_mambapy",
}
# What rounding to bfloat16, the coarsest of the dtypes, changes at most, and the smallest float16.
_ROUNDING = {"rtol": 2.0**-7, "atol": 2.0**-24}


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What must agree before a state may be read on from.

    Attributes:
        architecture: the name of the model's class.
        config: the fields of its configuration that its logits depend on, as JSON has them.
        parameters: dtype and shape of every tensor of the model, by name.
        samples: float64, up to 64 evenly spaced elements of each of them, in order: of a model trained further or
            adapted nearly all change. An edit of a few elements, such as one row of the embeddings, can go unseen.
        device: the kind of device, such as "cuda".
        tokenizer: hash of the tokenizer's definition; None where tokens were read without one.
    """

    architecture: str
    config: Mapping[str, Any]
    parameters: Mapping[str, tuple[str, list[int]]]
    samples: Tensor
    device: str
    tokenizer: str | None = None

    @classmethod
    def of(cls, model: MambalmForCausalLM, tokenizer: PreTrainedTokenizerBase | None = None) -> Fingerprint:
        """The fingerprint of a model in memory; reads a sample of each tensor only.

        Raises:
            ValueError: a parameter is offloaded, or the tokenizer has no tokenizers backend.
        """
        from transformers import PreTrainedConfig

        ignored = _WITHOUT_EFFECT | set(PreTrainedConfig().to_dict())
        config = {key: value for key, value in model.config.to_dict().items() if key not in ignored}
        tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        return cls(
            architecture=type(model).__name__,
            config=json.loads(json.dumps(config, default=str)),
            parameters={name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()},
            samples=torch.cat([_sample(name, tensor) for name, tensor in tensors.items()]),
            device=model.device.type,
            tokenizer=None if tokenizer is None else _tokenizer_digest(tokenizer),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the samples."""
        names = ("architecture", "config", "parameters", "device", "tokenizer")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], samples: Tensor) -> Fingerprint:
        """The inverse of `to_json`."""
        return cls(samples=samples, **content)

    @property
    def key(self) -> str:
        """A hash of everything: 64 hexadecimal digits."""
        content = json.dumps(self.to_json(), sort_keys=True).encode()
        return hashlib.sha256(content + self.samples.numpy().tobytes()).hexdigest()

    def differences(self, here: Fingerprint, *, convert: bool = False) -> Iterator[str]:
        """What differs between a state's fingerprint (self, "there") and a model's, the plainest first.

        With `convert`, device and dtypes may differ, and the samples by the rounding of the dtypes.
        """
        if self.architecture != here.architecture:
            yield f"the model there is a {self.architecture}, here a {here.architecture}"
        for key in sorted(self.config.keys() & here.config.keys()):
            if self.config[key] != here.config[key]:
                yield f"the model's {key} is {self.config[key]!r} there and {here.config[key]!r} here"
        yield from self._parameter_differences(here, convert)
        if self.device != here.device and not convert:
            yield f"the model there was on {self.device}, here it is on {here.device}; {_CONVERT}"
        if self.tokenizer != here.tokenizer and self.tokenizer and here.tokenizer:
            yield "the tokenizer there is another one than here; use the tokenizer that the text was read with"

    def _parameter_differences(self, here: Fingerprint, convert: bool) -> Iterator[str]:
        for name in sorted(self.parameters.keys() ^ here.parameters.keys()):
            place = "there" if name in self.parameters else "here"
            yield f"the model has {name} only {place}; quantise and adapt it as where the state was made"
            return
        mine, theirs = self._sampled(), here._sampled()
        for name, (dtype, shape) in self.parameters.items():
            other_dtype, other_shape = here.parameters[name]
            if list(shape) != list(other_shape):
                yield f"{name} is {tuple(shape)} there and {tuple(other_shape)} here"
            elif dtype != other_dtype and not convert:
                yield f"{name} is {dtype} there and {other_dtype} here; {_CONVERT}"
            elif dtype == other_dtype and not torch.equal(mine[name].view(torch.int64), theirs[name].view(torch.int64)):
                yield f"the values of {name} differ: the model was trained further, adapted or is another one"
            elif not torch.isclose(mine[name], theirs[name], equal_nan=True, **_ROUNDING).all():
                yield f"the values of {name} differ by more than the rounding of {dtype} and {other_dtype}"

    def _sampled(self) -> dict[str, Tensor]:
        """The samples of each parameter."""
        sizes = [min(SAMPLES, torch.Size(shape).numel()) for _, shape in self.parameters.values()]
        return dict(zip(self.parameters, self.samples.split(sizes), strict=True))


_CONVERT = "ask for the conversion with convert=True (--convert-state); the logits will then differ by rounding"


def _sample(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(f"{name} is offloaded, and its values are not at hand: load the model without device_map")
    count = tensor.numel()
    index = torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float64).long()
    return tensor.detach().reshape(-1)[index.to(tensor.device)].cpu().double()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} has no definition to hash; save it as a tokenizer.json")
    # Truncation and padding are set by the last call, and are no part of what the tokens mean.
    definition = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
