"""Generation: prompts of any length in constant memory, sampling, text as it arrives."""

from mambalm.generation.engine import Settings, decode, end_tokens, read, step
from mambalm.generation.sampling import Sampling
from mambalm.generation.text import TextStream, generate

__all__ = ["Sampling", "Settings", "TextStream", "decode", "end_tokens", "generate", "read", "step"]
