"""Calls like one that was made before: its launches again, without the way to them.

What leads to a launch (sizes, strides, room for what lies between kernels, the compiled kernel) takes the host longer
than many a kernel takes the device, and follows from the shapes, strides, dtypes and alignment of the arguments. The
first call of a kind notes what it allocates and launches. Those after it allocate as much, in one piece but for what
they return, and launch the same with their own addresses.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambalm.ops.triton_support import noted, on

__all__ = ["Notes", "repeat"]

_ALIGNMENT = 512  # bytes, as torch's
_MOST = 1024  # kinds of calls that are remembered

_ADDRESSES = 32  # at which a descriptor is remembered

# The number of an argument of a launch, whose memory it is (the call's tensors, then its rooms), and bytes from there.
Address = tuple[int, int, int]


class Base(NamedTuple):
    """What a descriptor wants to know of its tensor."""

    at: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.at


class Launch(NamedTuple):
    """A compiled kernel on its grid, and its arguments but for addresses."""

    run: Callable[..., None]
    values: list[Any]
    pointers: list[Address]
    descriptors: list[tuple[Address, dict[int, Any]]]  # and those made for calls before, by where they begin


class View(NamedTuple):
    """What a call returns: the number of a room, and what it shows of it if not all."""

    room: int
    of: tuple[Sequence[int], Sequence[int], int] | None


class Notes:
    """What a call allocates and launches, while it does."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.given = given
        self.rooms: list[Tensor] = []  # kept, so that nothing else comes to lie there
        self.launches: list[Launch] = []
        self.complete = len({t.data_ptr() for t in given}) == len(given) and all(t.numel() for t in given)

    def allocated(self, room: Tensor) -> None:
        """Told by `triton_support.empty`."""
        self.rooms.append(room)

    def launched(self, run: Callable[..., None], values: Sequence[Any]) -> None:
        """Told by `triton_support.launch`: what ``values`` were given to."""
        kept = list(values)
        pointers: list[Address] = []
        descriptors: list[tuple[Address, dict[int, Any]]] = []
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                pointers.append((i, *self.place(value)))
                kept[i] = None
            elif hasattr(value, "block_shape"):
                descriptors.append(((i, *self.place(value.base)), {}))
                kept[i] = _moved(value, 0)
        self.launches.append(Launch(run, kept, pointers, descriptors))

    def place(self, t: Tensor) -> tuple[int, int]:
        """Whose memory a tensor begins in, and after how many bytes."""
        at = t.data_ptr()
        for i, given in enumerate(self.given):
            if at == given.data_ptr():
                return i, 0
        for i, room in enumerate(self.rooms, len(self.given)):
            if t is room or 0 <= at - room.data_ptr() < room.nbytes:
                return i, at - room.data_ptr()
        self.complete = False  # allocated otherwise, such as the copy of an argument
        return 0, 0

    def result(self, t: Tensor | None) -> View | None:
        """Of what the call returns, where it is."""
        if t is None:
            return None
        for i, room in enumerate(self.rooms):
            if t is room:
                return View(i, None)
            if t.numel() and t.dtype == room.dtype and 0 <= t.data_ptr() - room.data_ptr() < room.nbytes:
                return View(i, (t.shape, t.stride(), int(t.storage_offset())))
        self.complete = False
        return None


class Plan:
    """What all calls of a kind do."""

    def __init__(self, notes: Notes, results: Sequence[Tensor | None]) -> None:
        views = [notes.result(t) for t in results]
        returned = {view.room for view in views if view is not None}
        self.launches = notes.launches
        self.tensors: list[tuple[Sequence[int], torch.dtype]] = []
        self.places: list[tuple[int, int]] = []  # of each room, in which tensor, and after how many bytes
        size = 0
        for i, room in enumerate(notes.rooms):
            if i in returned:
                self.places.append((len(self.tensors), 0))
                self.tensors.append((room.shape, room.dtype))
            else:  # in the last one, which is what lies between kernels
                self.places.append((-1, size))
                size += -(-room.nbytes // _ALIGNMENT) * _ALIGNMENT
        if size:
            self.tensors.append(((size,), torch.uint8))
        self.views = [None if view is None else View(self.places[view.room][0], view.of) for view in views]

    def __call__(self, given: Sequence[Tensor]) -> tuple[Any, ...]:
        """The call again, of other tensors."""
        device = given[0].device
        made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.tensors]
        starts = [t.data_ptr() for t in made]
        at = [t.data_ptr() for t in given] + [starts[i] + offset for i, offset in self.places]
        with on(device):
            for run, template, pointers, descriptors in self.launches:
                values = template.copy()
                for i, place, offset in pointers:
                    values[i] = at[place] + offset
                for (i, place, offset), known in descriptors:
                    begin = at[place] + offset
                    values[i] = known.get(begin) or _remembered(known, values[i], begin)
                run(*values)
        return tuple(
            None if view is None else made[view.room] if view.of is None else made[view.room].as_strided(*view.of)
            for view in self.views
        )


def _remembered(known: dict[int, Any], descriptor: Any, at: int) -> Any:
    """The same descriptor of a tensor at another address, to be found again."""
    if len(known) >= _ADDRESSES:
        known.clear()
    known[at] = _moved(descriptor, at)
    return known[at]


def _moved(descriptor: Any, at: int) -> Any:
    """The same descriptor of a tensor at another address."""
    base = Base(at, descriptor.base.dtype)
    return type(descriptor)(base, descriptor.shape, descriptor.strides, descriptor.block_shape, descriptor.layout)


_plans: dict[tuple[Any, ...], Plan | None] = {}


def repeat(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
    """``function(*arguments)``, of tensors on one device and of what can be compared.

    The function allocates what its kernels write by `triton_support.empty`, launches them by `triton_support.launch`,
    returns what it allocated, and does nothing else that a call of the same kind would have to do again. What it cannot
    be held to, as when it copies an argument to make it dense, it is called for every time.
    """
    given: list[Tensor] = []
    kinds: list[Any] = [function]
    for value in arguments:
        if isinstance(value, Tensor):
            given.append(value)
            kinds.append((value.shape, value.stride(), value.dtype, value.data_ptr() % 16 == 0))
        else:
            kinds.append(value)
    key = (given[0].device, *kinds)
    plan = _plans.get(key)
    if plan is not None:
        return plan(given)
    if key in _plans:
        return function(*arguments)
    notes = Notes(given)
    with noted(notes):
        results = function(*arguments)
    if len(_plans) >= _MOST:
        _plans.clear()
    plan = Plan(notes, results)
    _plans[key] = plan if notes.complete else None
    return results
