"""Argument checks that the ops share. Every message names the tensor, what was expected and what was given."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensors(op: str, required: Mapping[str, Tensor], optional: Mapping[str, Tensor | None]) -> None:
    """Raise TypeError unless each is a dense tensor of floating point in 16 to 64 bits (an optional one may be None),
    ValueError unless all are on the first one's device."""
    device = None
    for name, tensor in (*required.items(), *optional.items()):
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{op}: {name} must be real floating point of 16 to 64 bits, got {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got the layout {tensor.layout}")
        device = device or tensor.device
        if tensor.device != device:
            first = next(iter(required))
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {device}; move one of them")


def shape(op: str, name: str, tensor: Tensor | None, expected: Sequence[int], letters: str) -> None:
    """Raise ValueError unless ``tensor`` (None passes) has the ``expected`` shape, written in ``letters``."""
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape ({letters}) = {tuple(expected)}, got {tuple(tensor.shape)}")


def dims(op: str, name: str, tensor: Tensor, count: int, letters: str) -> None:
    """Raise ValueError unless ``tensor`` has ``count`` axes."""
    if tensor.ndim != count:
        raise ValueError(f"{op}: {name} must have {count} axes ({letters}), got shape {tuple(tensor.shape)}")


def offsets(op: str, cu_seqlens: Tensor | None, x: Tensor) -> None:
    """Check packed offsets: int32, beside x (1, l, ...) on its device, from 0 to l without going back.

    The values are read only on a CPU and outside of compilation: on a GPU that would wait for the device.

    Raises:
        TypeError, ValueError: they are none.
    """
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{op}: cu_seqlens must be an int32 tensor (s + 1), got {type(cu_seqlens).__name__}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{op}: cu_seqlens must be int32 offsets of shape (s + 1), "
            f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, what it packs on {x.device}; move one of them")
    batch, length = x.shape[:2]
    if batch != 1:
        raise ValueError(f"{op}: with cu_seqlens the batch axis must be 1 (one packed row), got {batch}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor:
        return
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != length or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to the length {length}, got {values}")
