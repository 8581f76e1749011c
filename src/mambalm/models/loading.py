"""Loading a model from a checkpoint of any format, and writing it in another: `mambalm.load` and `mambalm convert`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import GenerationConfig

from mambalm.models.common import MambalmForCausalLM
from mambalm.models.formats import WRITABLE, Checkpoint, CheckpointError, detect, require_match, written_whole
from mambalm.models.formats.checkpoint import COMPANIONS, DTYPES, EMBEDDINGS, HEAD, main_dtype
from mambalm.models.registration import LANGUAGE_MODELS
from mambalm.quantization.model import quantize_model, require_available

FAMILIES: dict[type, type[MambalmForCausalLM]] = {family.config_class: family for family in LANGUAGE_MODELS}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A repository may hold the same weights in several formats; the first of these that it has is downloaded.
HUB_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "consolidated*.safetensors", "*.pt")


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def load(
    path_or_hub_id: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    quantization: str | None = None,
) -> MambalmForCausalLM:
    """Load a checkpoint of any known format and return the model in eval mode.

    The parameters are the files' pages, read when they are used (and never written to), unless they are cast or moved.

    Args:
        path_or_hub_id: a folder, a file of weights in it, or the name of a Hugging Face repository.
        dtype: the dtype of all parameters; None keeps each one's in the file.
        device: where the parameters go.
        quantization: "int8" or "int4": the projections' weights in so few bits, on a CPU; see
            `mambalm.quantization.model` for what is left as it is. Activations stay in ``dtype``.

    Raises:
        CheckpointError: the format, a tensor or the vocabulary does not fit; the message names it and the remedy.
        ValueError: dtype or quantization is not one that is available.
    """
    if quantization is not None:
        require_available(quantization, device)
    model = build(read(path_or_hub_id), _dtype(dtype), device)
    return model if quantization is None else quantize_model(model, quantization)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    format: str = "transformers",
    dtype: torch.dtype | str | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint in another format: every tensor with its values and dtype, the tokenizer's files beside them.

    Args:
        source: as for `load`.
        destination: the folder to write, which appears when it is complete and not before.
        format: "transformers" or "mamba_ssm".
        dtype: cast all parameters to it; None keeps each one's.
        overwrite: replace a destination that is not empty.

    Returns:
        The destination.

    Raises:
        CheckpointError: the source does not load, the format has no counterpart for a field of the configuration, or
            the destination is not empty.
        ValueError: no such format is written, or the dtype is none that models compute in.
    """
    if format not in WRITABLE:
        raise ValueError(f"format {format!r} is not written: choose {' or '.join(WRITABLE)}")
    checkpoint = read(source).cast(_dtype(dtype))
    model = _skeleton(checkpoint)
    checkpoint.config.architectures = [type(model).__name__]
    checkpoint.config.dtype = main_dtype(checkpoint.tensors)
    destination = Path(destination)
    with written_whole(destination, overwrite=overwrite) as folder:
        WRITABLE[format].write(checkpoint, folder)
    return destination


def read(path_or_hub_id: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at a path or a name on the Hub, whatever its format."""
    format, source = detect(locate(path_or_hub_id))
    return format.read(source)


def locate(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """The local path of a checkpoint, downloaded if the argument is the name of a Hugging Face repository.

    Raises:
        CheckpointError: there is nothing at the path, and no repository of that name can be reached.
    """
    path = Path(path_or_hub_id).expanduser()
    name = os.fspath(path_or_hub_id)
    if not name:
        raise CheckpointError("the model's name is empty: name a folder, a file or a Hugging Face repository")
    if path.exists():
        return path
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name} does not exist: name a folder, a file or a Hugging Face repository (owner/name)")
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", *COMPANIONS]))
        for pattern in HUB_WEIGHTS:
            snapshot_download(name, allow_patterns=[pattern])
            if any(folder.glob(pattern)):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{name} is no folder here, and could not be had from the Hugging Face Hub nor from its cache "
            f"({str(error).strip().splitlines()[0]}): check the name, log in if it is private, or, offline, pass the "
            "path of a folder that you downloaded"
        ) from error
    return folder


def build(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> MambalmForCausalLM:
    """The model of a checkpoint, in eval mode; no parameter is initialised or copied on the way.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    model = _skeleton(checkpoint)
    tensors = {name: tensor.to(device, dtype or tensor.dtype) for name, tensor in checkpoint.tensors.items()}
    if checkpoint.config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDINGS]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.config.dtype = main_dtype(tensors)
    model.config.name_or_path = str(checkpoint.folder)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model.eval()


def _skeleton(checkpoint: Checkpoint) -> MambalmForCausalLM:
    """The model of a checkpoint's configuration, on the meta device; its tensors are compared with the checkpoint's."""
    family = FAMILIES[type(checkpoint.config)]
    try:
        with torch.device("meta"):
            model = family(checkpoint.config)
    except (IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{checkpoint.folder}: no model can be built from the configuration: {error}") from error
    require_match(checkpoint, model.state_dict())
    return model


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that a user named."""
    if dtype is None:
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    if found not in DTYPES:
        raise ValueError(
            f"dtype {dtype!r} is none that models compute in: use float32, bfloat16, float16 or float64, or None for "
            "the file's own"
        )
    return found
