"""The tokenizer of a checkpoint, for the commands."""

from mambalm.data.tokenizer import load_tokenizer

__all__ = ["load_tokenizer"]
