"""Argument checks that the ops share. Every message names the tensor, what was expected and what was given."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def shape(op: str, name: str, tensor: Tensor | None, expected: Sequence[int], letters: str) -> None:
    """Raise ValueError unless ``tensor`` (None passes) has the ``expected`` shape, written in ``letters``."""
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape ({letters}) = {tuple(expected)}, got {tuple(tensor.shape)}")


def dims(op: str, name: str, tensor: Tensor, count: int, letters: str) -> None:
    """Raise ValueError unless ``tensor`` has ``count`` axes, TypeError if it is none."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor ({letters}), got {type(tensor).__name__}")
    if tensor.ndim != count:
        raise ValueError(f"{op}: {name} must have {count} axes ({letters}), got shape {tuple(tensor.shape)}")


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are floating point and on the first one's device."""
    (first, reference), *others = tensors.items()
    assert reference is not None
    for name, tensor in [(first, reference), *others]:
        if tensor is None:
            continue
        if tensor.device != reference.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {reference.device}; move one of them")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must be real floating point, got {tensor.dtype}")


def offsets(op: str, cu_seqlens: Tensor | None, x: Tensor) -> None:
    """Check packed offsets: int32, beside x (1, l, ...) on its device, from 0 to l without going back.

    The values are read only on a CPU and outside of compilation: on a GPU that would wait for the device.
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
