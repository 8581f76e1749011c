"""Generation: prompts of any length in constant memory, sampling, text as it arrives."""

from mambalm.generation.beams import Beam, beam_search
from mambalm.generation.conversation import Conversation
from mambalm.generation.engine import Engine, Settings, Token, decode, end_tokens, read, step
from mambalm.generation.prefix_store import PrefixStore
from mambalm.generation.sampling import Sampling
from mambalm.generation.session import Session
from mambalm.generation.state_file import StateFileError
from mambalm.generation.text import TextStream, generate

__all__ = [
    "Beam",
    "Conversation",
    "Engine",
    "PrefixStore",
    "Sampling",
    "Session",
    "Settings",
    "StateFileError",
    "TextStream",
    "Token",
    "beam_search",
    "decode",
    "end_tokens",
    "generate",
    "read",
    "step",
]
