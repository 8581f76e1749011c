"""LoRA on every projection, through PEFT.

PEFT refuses adapters on out_proj (and "all-linear") for models whose config says mamba, mamba2 or falcon_mamba, because
stock kernels take the weights themselves and would go past the adapter without a word. mambalm calls every projection
as a module, so here that reason does not hold: the two functions of this module lift the check, for their own call and
their own model only. Plain `get_peft_model` keeps its error.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from mambalm.layers import Block
from mambalm.models.common import MambalmPreTrainedModel

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from mambalm.models.common import MambalmForCausalLM

# Modules whose weight an op takes: an adapter around them would never be called.
_NOT_CALLED = {
    "conv1d": "the convolution's weight goes into an op",
    "embeddings": "its tied head would not see the adapter",
    "lm_head": "it is tied to the embeddings",
}
# Arguments of loading that say where on the Hub an adapter is.
_WHERE = ("cache_dir", "revision", "subfolder", "token")


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter covers.

    Attributes:
        adapted: the full names of the adapted modules by their last name ("in_proj": [...]), sorted.
        trainable, total: numbers of parameters.
    """

    adapted: dict[str, list[str]]
    trainable: int
    total: int

    def __str__(self) -> str:
        counts = ", ".join(f"{name} x {len(modules)}" for name, modules in self.adapted.items())
        share = self.trainable / max(1, self.total)
        return f"adapted: {counts}; {self.trainable:,} of {self.total:,} parameters train ({share:.2%})"


def projections(model: PreTrainedModel) -> list[str]:
    """The last names of all projections in the model's blocks: in_proj, x_proj, dt_proj, out_proj, fc1, fc2."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    # By their width rather than by nn.Linear, which quantised projections need not be.
    linear = (name for block in blocks for name, part in block.named_modules() if hasattr(part, "in_features"))
    return sorted({name.rpartition(".")[2] for name in linear})


def attach_adapter(
    model: PreTrainedModel, config: LoraConfig | None = None, adapter_name: str = "default"
) -> tuple[PeftModel, AdapterReport]:
    """Put LoRA on a model's projections.

    Args:
        model: one of mambalm's models; its modules are replaced in place, as PEFT does.
        config: PEFT's; without one, rank 16 with alpha 32. Where its target_modules is None or "all-linear", every
            projection of every block is a target.
        adapter_name: what PEFT calls it.

    Returns:
        the PEFT model, and what was adapted.

    Raises:
        TypeError: the model is not mambalm's, whose projections alone are called as modules.
        ImportError: PEFT is not installed.
        ValueError: a target that matches no module, or one that an adapter cannot act on (conv1d, a tied head).
    """
    peft = _peft()
    _check_model(model)
    config = peft.LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM") if config is None else copy.copy(config)
    if config.target_modules is None or config.target_modules == "all-linear":
        config.target_modules = set(projections(model))
    _check_targets(model, config.target_modules)
    with _unlisted(model):
        adapted = peft.get_peft_model(model, config, adapter_name=adapter_name)
    return adapted, report(adapted)


def load_adapter(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    **kwargs: Any,
) -> tuple[PeftModel, AdapterReport]:
    """Load a saved adapter onto a model, or a further one onto a model that has adapters.

    Args:
        model: one of mambalm's models, or a `PeftModel` around one.
        path: a folder or a Hugging Face repository, as written by `save_pretrained`.
        adapter_name: what PEFT calls it; a name that is taken is an error.
        is_trainable: False freezes it.
        kwargs: passed on to PEFT.

    Raises:
        TypeError: the model is not mambalm's.
        ImportError: PEFT is not installed.
        ValueError: the name is taken, or the adapter was made for modules that the model does not have.
    """
    peft = _peft()
    nested = isinstance(model, peft.PeftModel)
    base: Any = model.get_base_model() if nested else model  # type: ignore[operator]
    _check_model(base)
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    # PEFT is content when one of several targets is found.
    _check_targets(base, peft.PeftConfig.from_pretrained(os.fspath(path), **where).target_modules)
    adapted: Any
    with _unlisted(base):
        if nested:
            if adapter_name in model.peft_config:
                raise ValueError(f"an adapter called {adapter_name!r} is loaded already: pass another adapter_name")
            model.load_adapter(os.fspath(path), adapter_name, is_trainable=is_trainable, **kwargs)
            adapted = model
        else:
            adapted = peft.PeftModel.from_pretrained(
                model, path, adapter_name=adapter_name, is_trainable=is_trainable, **kwargs
            )
    return adapted, report(adapted)


def merge_adapter(model: MambalmForCausalLM, path: str | os.PathLike[str]) -> MambalmForCausalLM:
    """Add a saved adapter to a model's weights, in place; returns the model, which is a plain one again.

    Args:
        model: with weights as they are, not quantised.
        path: as for `load_adapter`.

    Raises:
        FileNotFoundError: there is no adapter at that path.
        ImportError, TypeError, ValueError: see `load_adapter`.
    """
    name = os.fspath(path)
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "adapter_config.json")):
        raise FileNotFoundError(f"{name} is no adapter's folder: it has no adapter_config.json")
    adapted, _ = load_adapter(model, path)
    merged: Any = adapted.merge_and_unload(safe_merge=True)
    return merged


def report(model: nn.Module) -> AdapterReport:
    """What the adapters of a PEFT model cover."""
    base_tuner_layer = _peft().tuners.tuners_utils.BaseTunerLayer
    adapted: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, base_tuner_layer):
            adapted.setdefault(name.rpartition(".")[2], []).append(name)
    sizes = [(_numbers(parameter), parameter.requires_grad) for parameter in model.parameters()]
    trainable = sum(size for size, trains in sizes if trains)
    return AdapterReport(dict(sorted(adapted.items())), trainable, sum(size for size, _ in sizes))


def _numbers(parameter: nn.Parameter) -> int:
    """How many a parameter holds; bitsandbytes packs several into a byte, and keeps their shape beside them."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


@contextmanager
def _unlisted(model: PreTrainedModel) -> Iterator[None]:
    """Within, this model's config answers with a model_type that is not on PEFT's list."""
    # model_type belongs to the class; an attribute of the instance hides it, and is taken away again.
    attributes = vars(model.config)
    missing = object()
    before = attributes.get("model_type", missing)
    attributes["model_type"] = f"mambalm_{model.config.model_type}"
    try:
        yield
    finally:
        if before is missing:
            del attributes["model_type"]
        else:
            attributes["model_type"] = before


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need PEFT: pip install 'mambalm[train]'") from error
    return peft


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, MambalmPreTrainedModel):
        raise TypeError(
            f"{type(model).__module__}.{type(model).__name__} is not a mambalm model, and may pass its weights around "
            "the adapters: load the checkpoint with mambalm.load, or call mambalm.register() before AutoModel"
        )


def _check_targets(model: PreTrainedModel, targets: Any) -> None:
    if isinstance(targets, str):
        return  # a regular expression, of which PEFT itself says when it matches nothing
    names = [name for name, _ in model.named_modules()]
    tied = model.config.tie_word_embeddings
    for target in sorted(targets):
        matches = [name for name in names if name == target or name.endswith(f".{target}")]
        if not matches:
            known = ", ".join(projections(model))
            raise ValueError(f"target {target!r} matches no module of {type(model).__name__}: it has {known}")
        last = target.rpartition(".")[2]
        if last in _NOT_CALLED and (last == "conv1d" or tied):
            raise ValueError(f"target {target!r} cannot be adapted: {_NOT_CALLED[last]}; leave it out")
