"""Mamba-2 models (Dao & Gu 2024, arXiv:2405.21060) on transformers' `Mamba2Config`, Codestral Mamba among them."""

from __future__ import annotations

from transformers import Mamba2Config, PreTrainedConfig

from mambalm.layers import Mamba2, RMSNorm
from mambalm.models.arguments import check_activation
from mambalm.models.common import MambaBlock, MambalmForCausalLM, MambalmModel, MambalmPreTrainedModel


class Mamba2PreTrainedModel(MambalmPreTrainedModel):
    """Mamba-2's config and layer."""

    config_class = Mamba2Config

    @staticmethod
    def make_block(config: PreTrainedConfig, layer_idx: int) -> MambaBlock:
        """A block with a Mamba-2 layer."""
        check_activation(config)
        mixer = Mamba2(
            config.hidden_size,
            d_state=config.state_size,
            d_conv=config.conv_kernel,
            headdim=config.head_dim,
            ngroups=config.n_groups,
            dt_min=config.time_step_min,
            dt_max=config.time_step_max,
            dt_init_floor=config.time_step_floor,
            dt_limit=tuple(config.time_step_limit),
            bias=config.use_bias,
            conv_bias=config.use_conv_bias,
            # config.chunk_size suits other kernels than ours: the backend knows best, and the result is the same.
            chunk_size=None,
            d_inner=config.num_heads * config.head_dim,
            norm_eps=config.layer_norm_epsilon,
            layer_idx=layer_idx,
        )
        norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        return MambaBlock(norm, mixer, residual_in_fp32=config.residual_in_fp32)


class Mamba2Model(Mamba2PreTrainedModel, MambalmModel):
    """Mamba-2's stack of blocks."""


class Mamba2ForCausalLM(Mamba2PreTrainedModel, MambalmForCausalLM):
    """The Mamba-2 language model."""

    backbone_class = Mamba2Model
