"""Opt-in: transformers' Auto classes return mambalm's models for the families that mambalm knows."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from mambalm.models.falcon_mamba import FalconMambaForCausalLM, FalconMambaModel
from mambalm.models.hybrid import HybridConfig, MambaHybridForCausalLM, MambaHybridModel
from mambalm.models.mamba import MambaForCausalLM, MambaModel
from mambalm.models.mamba2 import Mamba2ForCausalLM, Mamba2Model

_BACKBONES = (MambaModel, FalconMambaModel, Mamba2Model, MambaHybridModel)
LANGUAGE_MODELS = (MambaForCausalLM, FalconMambaForCausalLM, Mamba2ForCausalLM, MambaHybridForCausalLM)


def register() -> None:
    """Make `AutoModel` and `AutoModelForCausalLM`, and so `pipeline`, return mambalm's classes in this process.

    Calling it again changes nothing.

    Raises:
        RuntimeError: this version of transformers does not take the registration.
    """
    AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
    for auto, models in ((AutoModel, _BACKBONES), (AutoModelForCausalLM, LANGUAGE_MODELS)):
        for model in models:
            _register(auto, model)


def _register(auto: Any, model: type[PreTrainedModel]) -> None:
    config: Any = model.config_class
    auto.register(config, model, exist_ok=True)
    mapping = auto._model_mapping
    if mapping[config] is not model:
        # transformers 5.17 passes over configs of its own without a word; this is where it keeps the others.
        mapping._extra_content[config] = model
    if mapping[config] is not model:
        raise RuntimeError(
            f"transformers keeps {mapping[config].__name__} for {config.__name__}: "
            f"call {model.__module__}.{model.__name__}.from_pretrained instead, or mambalm.load"
        )
