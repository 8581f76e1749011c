"""FalconMamba models (TII 2024, arXiv:2410.05355): Mamba with weightless norms on Δ, B and C."""

from __future__ import annotations

from transformers import FalconMambaConfig, PreTrainedConfig

from mambalm.models.common import MambaBlock, MambalmForCausalLM, MambalmModel, MambalmPreTrainedModel
from mambalm.models.mamba import mamba_block


class FalconMambaPreTrainedModel(MambalmPreTrainedModel):
    """FalconMamba's config and layer."""

    config_class = FalconMambaConfig

    @staticmethod
    def make_block(config: PreTrainedConfig, layer_idx: int) -> MambaBlock:
        """A block with a Mamba layer that normalises Δ, B and C."""
        return mamba_block(config, layer_idx, bcdt_rms_eps=config.mixer_rms_eps)


class FalconMambaModel(FalconMambaPreTrainedModel, MambalmModel):
    """FalconMamba's stack of blocks."""


class FalconMambaForCausalLM(FalconMambaPreTrainedModel, MambalmForCausalLM):
    """The FalconMamba language model."""

    backbone_class = FalconMambaModel
