"""Layers: modules with plain arguments that read a sequence of any length on from a state, and give a state out."""

from mambalm.layers.attention import Attention
from mambalm.layers.block import Block
from mambalm.layers.mamba import Mamba
from mambalm.layers.mamba2 import Mamba2
from mambalm.layers.mlp import GatedMLP
from mambalm.layers.norm import RMSNorm
from mambalm.layers.state import AttentionState, MambaState, State

__all__ = ["Attention", "AttentionState", "Block", "GatedMLP", "Mamba", "Mamba2", "MambaState", "RMSNorm", "State"]
