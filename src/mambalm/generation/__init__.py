"""Generation: prompts of any length in constant memory, sampling, text as it arrives."""

from mambalm.generation.conversation import Conversation
from mambalm.generation.engine import Settings, decode, end_tokens, read, step
from mambalm.generation.prefix_store import PrefixStore
from mambalm.generation.sampling import Sampling
from mambalm.generation.session import Session
from mambalm.generation.text import TextStream, generate

__all__ = [
    "Conversation",
    "PrefixStore",
    "Sampling",
    "Session",
    "Settings",
    "TextStream",
    "decode",
    "end_tokens",
    "generate",
    "read",
    "step",
]
