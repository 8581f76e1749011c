"""Mamba models (Gu & Dao 2023, arXiv:2312.00752) on transformers' `MambaConfig`."""

from __future__ import annotations

from transformers import MambaConfig, PreTrainedConfig

from mambalm.layers import Mamba, RMSNorm
from mambalm.models.arguments import check_activation
from mambalm.models.common import MambaBlock, MambalmForCausalLM, MambalmModel, MambalmPreTrainedModel


def mamba_block(config: PreTrainedConfig, layer_idx: int, bcdt_rms_eps: float | None = None) -> MambaBlock:
    """A block with a Mamba layer; `intermediate_size` counts, whatever `expand` says."""
    check_activation(config)
    mixer = Mamba(
        config.hidden_size,
        d_state=config.state_size,
        d_conv=config.conv_kernel,
        dt_rank=config.time_step_rank,
        dt_min=config.time_step_min,
        dt_max=config.time_step_max,
        dt_init=config.time_step_init_scheme,
        dt_scale=config.time_step_scale,
        dt_init_floor=config.time_step_floor,
        conv_bias=config.use_conv_bias,
        bias=config.use_bias,
        d_inner=config.intermediate_size,
        bcdt_rms_eps=bcdt_rms_eps,
        layer_idx=layer_idx,
    )
    norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
    return MambaBlock(norm, mixer, residual_in_fp32=config.residual_in_fp32)


class MambaPreTrainedModel(MambalmPreTrainedModel):
    """Mamba's config and layer."""

    config_class = MambaConfig

    @staticmethod
    def make_block(config: PreTrainedConfig, layer_idx: int) -> MambaBlock:
        """A block with a Mamba layer."""
        return mamba_block(config, layer_idx)


class MambaModel(MambaPreTrainedModel, MambalmModel):
    """Mamba's stack of blocks."""


class MambaForCausalLM(MambaPreTrainedModel, MambalmForCausalLM):
    """The Mamba language model."""

    backbone_class = MambaModel
