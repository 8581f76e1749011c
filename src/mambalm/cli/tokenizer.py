"""The tokenizer of a checkpoint, for the commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path_or_hub_id: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or a repository.

    Raises:
        ValueError: transformers can load none from there.
    """
    # Seconds, which --help and a mistyped option need not wait for.
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_hub_id)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path_or_hub_id} has no tokenizer that transformers can load ({str(error).splitlines()[0]}); "
            "put its tokenizer.json there, or name another with --tokenizer"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
