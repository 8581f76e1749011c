"""Opt-in: transformers' Auto classes return mambalm's models for the families that mambalm knows."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mambalm.models.falcon_mamba import FalconMambaForCausalLM, FalconMambaModel
from mambalm.models.hybrid import HybridConfig, MambaHybridForCausalLM, MambaHybridModel
from mambalm.models.mamba import MambaForCausalLM, MambaModel
from mambalm.models.mamba2 import Mamba2ForCausalLM, Mamba2Model

_FAMILIES = (
    (MambaModel, MambaForCausalLM),
    (FalconMambaModel, FalconMambaForCausalLM),
    (Mamba2Model, Mamba2ForCausalLM),
    (MambaHybridModel, MambaHybridForCausalLM),
)


def register() -> None:
    """Make `AutoModel` and `AutoModelForCausalLM`, and so `pipeline`, return mambalm's classes in this process.

    Calling it again changes nothing.
    """
    AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
    for backbone, language_model in _FAMILIES:
        AutoModel.register(backbone.config_class, backbone, exist_ok=True)
        AutoModelForCausalLM.register(language_model.config_class, language_model, exist_ok=True)
