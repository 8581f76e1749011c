"""Activations that cost more memory than the time it takes to compute them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambalm.layers.hooks import hooked

_CHANGED = "a tensor that the backward needs, or computes activations from, was changed in place since"


def is_wanted(recompute: bool | str | None, x: Tensor) -> bool:
    """Whether the backward of a layer with this ``recompute`` (None: on a GPU) computes again what it made of ``x``.

    torch.compile decides for itself what to keep, and so do hooks that are around already (checkpointing, offloading);
    torch.func takes no hooks.
    """
    if not (x.is_cuda if recompute is None else bool(recompute)):
        return False
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None or _enclosing() is not None


def _enclosing() -> Recomputation | None:
    """The context around, if it is what sees saved tensors now."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    owner = None if hooks is None else getattr(hooks[0], "__self__", None)
    return owner if isinstance(owner, Recomputation) else None


class Recomputation:
    """A context whose operators do not keep the tensors that were given, nor views of them: the backward computes those
    again.

    In the context every operator that wants to keep such a tensor keeps a note instead. The first note that the
    backward reads computes the tensor, the last lets go of it. Nothing else changes: what is computed again is what was
    computed before, by the same kernels under the same autocast, so gradients are the same bit for bit. It is for
    functions without random numbers. What an enclosing one was given is given here too. As without it, the backward
    refuses to go on from a tensor that was changed in place since.
    """

    def __init__(self) -> None:
        # By the address of their memory; the tensors too, so that it is theirs while the context lasts.
        self._given: dict[int, tuple[Tensor, _Again]] = {}
        self._outer: Recomputation | None = None
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> Recomputation:
        self._outer = _enclosing()
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._given.clear()
        self._outer = None

    def give(
        self, tensor: Tensor, module: nn.Module, function: Callable[..., Tensor], *arguments: Tensor | None
    ) -> None:
        """Say that ``tensor``, contiguous in memory of its own, is ``function(*arguments)`` by ``module``.

        The arguments are kept, unless they were given themselves. A module with hooks is not called again.
        """
        if hooked(module):
            return
        kept = self._keep(arguments)

        def again(*arguments: Tensor | None) -> list[Tensor]:
            with torch.no_grad():
                return [function(*arguments)]

        self._given[_address(tensor)] = (tensor.detach(), _Again(again, kept, module.parameters(), tensor.device.type))

    def run(
        self, parameters: Iterable[Tensor], function: Callable[..., tuple[Tensor, ...]], *arguments: Tensor | None
    ) -> tuple[Tensor, ...]:
        """``function(*arguments)``, of which nothing is kept but the arguments, unless they were given.

        The first of its outputs, contiguous in memory of its own, counts as given. ``parameters`` are what it reads
        besides.
        """
        kept, wanted = self._keep(arguments), [t is not None and t.requires_grad for t in arguments]
        device = next(t for t in arguments if t is not None).device.type

        def again(*arguments: Tensor | None) -> list[Tensor]:
            found: list[Tensor] = []
            apart = [
                t if t is None else t.detach().requires_grad_(grad) for t, grad in zip(arguments, wanted, strict=True)
            ]
            keep = torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.detach()), _unpack)
            with torch.enable_grad(), keep:
                first = function(*apart)[0]
            if len(found) != count:
                raise RuntimeError(
                    f"a layer that kept {count} tensors wants to keep {len(found)} when the backward computes it "
                    "again: it must not change between the two; set recompute=False if it does"
                )
            return [first.detach(), *found]

        record = _Again(again, kept, parameters, device)
        count = 0

        def pack(tensor: Tensor) -> _Note:
            nonlocal count
            count += 1
            return record.note(count)

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            outputs = function(*arguments)
        self._given[_address(outputs[0])] = (outputs[0].detach(), record)
        return outputs

    def _keep(self, arguments: Sequence[Tensor | None]) -> list[Any]:
        return [None if t is None else self._note(t) or t for t in arguments]

    def _pack(self, tensor: Tensor) -> Any:
        return self._note(tensor) or _Kept(tensor, tensor._version)

    def _note(self, tensor: Tensor) -> _Note | None:
        given, again = self._given.get(_address(tensor), (None, None))
        if given is None or again is None:
            return None if self._outer is None else self._outer._note(tensor)
        return again.note(0, tensor) if tensor.dtype == given.dtype and tensor.numel() else None


class _Again:
    """Tensors that are computed again, all at once."""

    def __init__(
        self,
        function: Callable[..., list[Tensor]],
        arguments: Sequence[Any],
        parameters: Iterable[Tensor],
        device: str,
    ) -> None:
        self._notes = self._unread = 0
        self._function = function
        self._arguments = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
        self._parameters = list(parameters)
        self._versions = self._present_versions()
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self._found: list[Tensor] | None = None

    def note(self, index: int, view: Tensor | None = None) -> _Note:
        """A note of the tensor of this index, or of a view of it."""
        self._notes += 1
        return _Note(self, index, None if view is None else (view.shape, view.stride(), view.storage_offset()))

    def read(self, index: int) -> Tensor:
        """The tensor of this index, for one of the notes."""
        if self._found is None:
            self._found, self._unread = self._compute(), self._notes
        tensor = self._found[index]
        self._unread -= 1
        if not self._unread:
            self._found = None
        return tensor

    def _present_versions(self) -> list[int | None]:
        read = (*self._arguments, *self._parameters)
        return [t._version if isinstance(t, Tensor) else None for t in read]

    def _compute(self) -> list[Tensor]:
        if self._versions != self._present_versions():
            raise RuntimeError(_CHANGED)
        device, dtype, enabled = self._autocast
        with torch.autocast(device, dtype, enabled=enabled):
            return self._function(*(t if t is None else _unpack(t) for t in self._arguments))


@dataclass(frozen=True)
class _Note:
    """What an operator keeps instead of a tensor."""

    again: _Again
    index: int
    layout: tuple[Any, ...] | None

    def read(self) -> Tensor:
        """The tensor."""
        tensor = self.again.read(self.index)
        return tensor if self.layout is None else tensor.as_strided(*self.layout)


@dataclass(frozen=True)
class _Kept:
    """A tensor that an operator keeps; autograd itself does not look for changes of what hooks have packed."""

    tensor: Tensor
    version: int

    def read(self) -> Tensor:
        """The tensor."""
        if self.tensor._version != self.version:
            raise RuntimeError(_CHANGED)
        return self.tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _unpack(kept: Any) -> Tensor:
    return kept.read() if isinstance(kept, _Note | _Kept) else kept
