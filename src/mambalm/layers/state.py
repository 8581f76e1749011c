"""What a layer or a model has read, as values: never changed in place, differentiable, with the batch as first axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

_S = TypeVar("_S")
Rows = int | slice | Sequence[int] | Tensor


class _Batched:
    """The methods of every state, written once over its dataclass fields: tensors, other states, tuples of them, None.

    All of them return a new state; none copies what it need not (``clone`` does).
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    # The fields that hold activations; the others (SSM states, lengths, positions) keep their dtype in ``to``.
    _activations: ClassVar[tuple[str, ...]] = ()

    def _parts(self) -> Iterator[tuple[str, Tensor | _Batched]]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for part in value if isinstance(value, tuple) else (value,):
                if part is not None:
                    yield field.name, part

    def _map(self, function: Callable[[Tensor, bool], Tensor]) -> Self:
        """Apply ``function(tensor, is_activation)`` to every tensor."""

        def visit(name: str, part: Tensor | _Batched | tuple | None) -> Tensor | _Batched | tuple | None:
            if isinstance(part, tuple):
                return tuple(visit(name, item) for item in part)
            if isinstance(part, _Batched):
                return part._map(function)
            return None if part is None else function(part, name in self._activations)

        names = [field.name for field in dataclasses.fields(self)]
        return type(self)(**{name: visit(name, getattr(self, name)) for name in names})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move to ``device``; ``dtype`` is for the convolution inputs, keys and values: SSM states stay as they are."""
        return self._map(lambda tensor, activation: tensor.to(device=device, dtype=dtype if activation else None))

    def detach(self) -> Self:
        """The same values, cut from the graph: truncated backpropagation through time."""
        return self._map(lambda tensor, _: tensor.detach())

    def clone(self) -> Self:
        """The same values in memory of their own; gradients flow through."""
        return self._map(lambda tensor, _: tensor.clone())

    def index(self, rows: Rows) -> Self:
        """The chosen rows of the batch, in that order; one integer keeps a batch axis of 1.

        Raises:
            IndexError: a row is outside the batch.
        """
        if isinstance(rows, int):
            rows = [rows]
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self._first().device)
            rows = rows if rows.dtype == torch.bool else rows.long()
            rows = rows if rows.ndim else rows[None]
        return self._map(lambda tensor, _: tensor[rows])

    __getitem__ = index

    def reorder(self, beam_idx: Tensor) -> Self:
        """Row i becomes what row ``beam_idx[i]`` was: beam search."""
        return self.index(beam_idx)

    @property
    def batch_size(self) -> int:
        """The number of rows (of documents, for the state of a packed sequence)."""
        return self._first().shape[0]

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(part.nbytes for _, part in self._parts())

    def _first(self) -> Tensor:
        _, part = next(self._parts())
        return part._first() if isinstance(part, _Batched) else part

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """Join states along the batch, in order.

        Raises:
            ValueError: there is none, or they are not states of the same model.
            TypeError: they are of different kinds.
        """
        if not states:
            raise ValueError(f"{cls.__name__}.cat needs at least one state")
        if any(type(state) is not cls for state in states):
            kinds = ", ".join(sorted({type(state).__name__ for state in states}))
            raise TypeError(f"{cls.__name__}.cat joins {cls.__name__}s only, got {kinds}")
        return cls(
            **{
                field.name: _joined([getattr(state, field.name) for state in states], f"{cls.__name__}.{field.name}")
                for field in dataclasses.fields(cls)
            }
        )


def _joined(parts: list, name: str) -> Tensor | _Batched | tuple | None:
    """Concatenate one field of several states along the batch."""
    first = parts[0]
    if any((part is None) != (first is None) for part in parts):
        raise ValueError(f"{name} is missing from some of the states: they are of different models")
    if first is None:
        return None
    if isinstance(first, tuple):
        if any(len(part) != len(first) for part in parts):
            counts = sorted({len(part) for part in parts})
            raise ValueError(f"{name} differ in number ({counts}): the states are of different models")
        return tuple(_joined(list(items), name) for items in zip(*parts, strict=True))
    if isinstance(first, _Batched):
        return type(first).cat(parts)
    if any(part.shape[1:] != first.shape[1:] for part in parts):
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"{name} differ in more than the batch ({shapes}): the states are of different models")
    return torch.cat(parts)


def expect(kind: type[_S], state: object) -> _S | None:
    """``state`` itself (None passes).

    Raises:
        TypeError: it is not of this kind.
    """
    if state is None or isinstance(state, kind):
        return state
    raise TypeError(f"the layer reads on from a {kind.__name__}, got a {type(state).__name__}")


@dataclass(frozen=True, eq=False)
class MambaState(_Batched):
    """The state of a Mamba or Mamba-2 layer.

    Attributes:
        conv: the last k - 1 inputs of the convolution, oldest first (b, channels, k - 1), in the activations' dtype.
        ssm: the state h, float32 (float64 in a float64 model): (b, d, n) for Mamba, (b, h, p, n) for Mamba-2.
    """

    _activations: ClassVar[tuple[str, ...]] = ("conv",)

    conv: Tensor
    ssm: Tensor

    @staticmethod
    def unpack(state: object) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """(conv, ssm), or two None for no state; see ``expect``."""
        before = expect(MambaState, state)
        return (None, None) if before is None else (before.conv, before.ssm)


@dataclass(frozen=True, eq=False)
class AttentionState(_Batched):
    """The state of an attention layer.

    Attributes:
        keys: rotated keys (b, m, heads_kv, head_dim); of row i the first ``lengths[i]`` count; the rest is finite.
        values: of the same shape.
        lengths: int64 (b).
        conv: the last k - 1 inputs of the convolution (b, channels, k - 1), in layers that have one.
    """

    _activations: ClassVar[tuple[str, ...]] = ("keys", "values", "conv")

    keys: Tensor
    values: Tensor
    lengths: Tensor
    conv: Tensor | None = None

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """Join states along the batch; shorter buffers of keys and values are filled up with zeros."""
        longest = max((state.keys.shape[1] for state in states if isinstance(state, cls)), default=0)
        return super().cat([state._padded(longest) if isinstance(state, cls) else state for state in states])

    def appended(self, keys: Tensor, values: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, l longer, with new ones (b, l, heads_kv, head_dim) at their ``position`` (b, l)."""
        row = torch.arange(len(keys), device=keys.device)[:, None]

        def append(past: Tensor, new: Tensor) -> Tensor:
            longer = torch.cat([past.to(new.dtype), torch.zeros_like(new)], dim=1)
            return longer.index_put((row, position), new)

        return append(self.keys, keys), append(self.values, values)

    def _padded(self, length: int) -> Self:
        fill = (0, 0, 0, 0, 0, length - self.keys.shape[1])
        return dataclasses.replace(self, keys=F.pad(self.keys, fill), values=F.pad(self.values, fill))


class RoomyAttentionState(AttentionState):
    """One whose keys and values stay where they are, in buffers with room for more: no value, but the engine's own.

    A row that has no room left overwrites its last place: the engine lets none come to that but those that it does not
    use.
    """

    def appended(self, keys: Tensor, values: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers, with the new ones written into them."""
        row = torch.arange(len(keys), device=keys.device)[:, None]
        at = (row, position.clamp(max=self.keys.shape[1] - 1))
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.index_put_(at, new.to(buffer.dtype))
        return self.keys, self.values

    def fill(self, other: AttentionState) -> None:
        """Let the first rows be what those of another state have read."""
        rows, length = len(other.lengths), min(other.keys.shape[1], self.keys.shape[1])
        self.keys[:rows, :length].copy_(other.keys[:, :length])
        self.values[:rows, :length].copy_(other.values[:, :length])

    def value(self, length: int) -> AttentionState:
        """The same as a value, of which no row has read more than ``length`` tokens."""
        return AttentionState(self.keys[:, :length], self.values[:, :length], self.lengths, self.conv)


@dataclass(frozen=True, eq=False)
class State(_Batched):
    """The state of a model.

    Attributes:
        layers: one state per layer.
        position: int64 (b), the number of tokens that each row has read.
    """

    layers: tuple[MambaState | AttentionState, ...]
    position: Tensor

    def _first(self) -> Tensor:
        return self.position


for _kind in (MambaState, AttentionState, State):
    pytree.register_dataclass(_kind)
