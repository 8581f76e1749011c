"""Activations that cost more memory than the time it takes to compute them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_wanted(recompute: bool | str | None, x: Tensor) -> bool:
    """Whether the backward of a layer with this ``recompute`` (None: on a GPU) computes again what it made of ``x``.

    torch.compile decides for itself what to keep, and so do hooks that are around already (checkpointing, offloading).
    """
    if not (x.is_cuda if recompute is None else bool(recompute)):
        return False
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is None or isinstance(getattr(hooks[0], "__self__", None), Recomputation)


class Recomputation:
    """A context whose operators do not keep the tensors that were given, nor views of them: the backward computes those
    again.

    In the context every operator that wants to keep such a tensor keeps a note instead. The first note that the
    backward reads computes the tensor, the last lets go of it. Nothing else changes: what is computed again is what was
    computed before, by the same kernels under the same autocast, so gradients are the same bit for bit. It is for
    functions without random numbers.
    """

    def __init__(self) -> None:
        # By the address of their memory; the tensors too, so that it is theirs while the context lasts.
        self._given: dict[int, tuple[Tensor, _Again]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> Recomputation:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._given.clear()

    def give(self, tensor: Tensor, function: Callable[..., Tensor], *arguments: Tensor | None) -> None:
        """Say that ``tensor``, contiguous in memory of its own, is ``function(*arguments)``; the arguments are kept."""
        self._given[tensor.untyped_storage().data_ptr()] = (tensor.detach(), _Again(tensor, function, arguments))

    def _pack(self, tensor: Tensor) -> Any:
        given, again = self._given.get(tensor.untyped_storage().data_ptr(), (None, None))
        if given is None or again is None or tensor.dtype != given.dtype or not tensor.numel():
            return tensor
        again.notes += 1
        return again, tensor.shape, tensor.stride(), tensor.storage_offset()


class _Again:
    """One tensor that is computed again."""

    def __init__(self, tensor: Tensor, function: Callable[..., Tensor], arguments: tuple[Tensor | None, ...]) -> None:
        self.notes = self._unread = 0
        self._function = function
        self._arguments = [None if t is None else t.detach() for t in arguments]
        self._versions = [None if t is None else t._version for t in self._arguments]
        device = tensor.device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self._found: Tensor | None = None

    def read(self) -> Tensor:
        """The tensor, for one of the notes."""
        if self._found is None:
            self._found, self._unread = self._compute(), self.notes
        found = self._found
        self._unread -= 1
        if not self._unread:
            self._found = None
        return found

    def _compute(self) -> Tensor:
        if self._versions != [None if t is None else t._version for t in self._arguments]:
            raise RuntimeError("a tensor that the backward computes activations from was changed in place since")
        device, dtype, enabled = self._autocast
        with torch.no_grad(), torch.autocast(device, dtype, enabled=enabled):
            return self._function(*self._arguments)


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    again, *layout = kept
    return again.read().as_strided(*layout)
