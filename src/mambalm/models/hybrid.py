"""Models that transformers has no config for: hybrids of Mamba and attention layers, Transformer++, LayerNorm models.

state-spaces' mamba2attn-2.7b and transformerpp-2.7b are of this kind, and OpenLM's Mamba models with LayerNorm.
"""

from torch import nn
from transformers import PreTrainedConfig

from mambalm.layers import Attention, GatedMLP, Mamba, Mamba2, RMSNorm
from mambalm.models.common import MambaBlock, MambalmForCausalLM, MambalmModel, MambalmPreTrainedModel
from mambalm.models.hybrid_config import RECURRENT, HybridConfig

__all__ = ["HybridConfig", "MambaHybridForCausalLM", "MambaHybridModel", "MambaHybridPreTrainedModel"]


class MambaHybridPreTrainedModel(MambalmPreTrainedModel):
    """The hybrids' config and layers."""

    config_class = HybridConfig

    @staticmethod
    def make_norm(config: PreTrainedConfig) -> RMSNorm | nn.LayerNorm:
        """RMSNorm, or LayerNorm with a bias."""
        kind = RMSNorm if config.rms_norm else nn.LayerNorm
        return kind(config.hidden_size, eps=config.layer_norm_epsilon)

    @classmethod
    def make_block(cls, config: PreTrainedConfig, layer_idx: int) -> MambaBlock:
        """A block with attention or a recurrent layer, and with an MLP if there is one."""
        mixer: Attention | Mamba | Mamba2
        if layer_idx in config.attn_layer_idx:
            mixer = Attention(config.hidden_size, **config.attn_cfg, layer_idx=layer_idx)
        else:
            arguments = {name: value for name, value in config.ssm_cfg.items() if name != "layer"}
            kind = RECURRENT[config.ssm_cfg.get("layer", "Mamba1")]
            mixer = kind(config.hidden_size, **arguments, layer_idx=layer_idx)
        norm2 = cls.make_norm(config) if config.d_intermediate else None
        mlp = GatedMLP(config.hidden_size, config.d_intermediate) if config.d_intermediate else None
        return MambaBlock(cls.make_norm(config), mixer, norm2, mlp, residual_in_fp32=config.residual_in_fp32)

    @property
    def residual_branches(self) -> int:
        """Mixers and MLPs."""
        return self.config.num_hidden_layers * (2 if self.config.d_intermediate else 1)


class MambaHybridModel(MambaHybridPreTrainedModel, MambalmModel):
    """The hybrids' stack of blocks."""


class MambaHybridForCausalLM(MambaHybridPreTrainedModel, MambalmForCausalLM):
    """The hybrid language model."""

    backbone_class = MambaHybridModel
