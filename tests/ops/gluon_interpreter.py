"""Runs kernels in Gluon on a CPU, where Triton's interpreter runs none: what they compute and how their warps wait for
each other, not layouts, registers or the memory model.

A task of `warp_specialize` is a thread, memory is tensors, copies are done at once. Barriers count arrivals and bytes
as the hardware does; a wait that never ends is an error, and so is what happens in shared memory in no order that
barriers see to (shared_memory.py). Programs run one after the other.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from itertools import product as product_of
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.ops.shared_memory import RUNNING, Barrier, Barriers, Row, Task, helper


class Value(Tensor):
    """A tensor, with the ways of Triton's."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:  # type: ignore[override]
        return self.reshape(-1).view(dtype).view(self.shape) if bitcast else super().to(dtype)

    # What Triton assigns is a new value.
    def __iadd__(self, other: Any) -> Tensor:
        return self + other

    def __isub__(self, other: Any) -> Tensor:
        return self - other

    def __imul__(self, other: Any) -> Tensor:
        return self * other


def value(data: Any) -> Value:
    return torch.as_tensor(data).as_subclass(Value)


class Pointer:
    """A place in a contiguous tensor, or many."""

    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset
        self.dtype = SimpleNamespace(element_ty=base.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.base, self.offset + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.base, self.offset - offset)

    def places(self) -> Tensor:
        return torch.as_tensor(self.offset).as_subclass(Tensor).long()


class Memory:
    """Shared memory: of a tensor, and the rows of what was allocated, of which it may be a part."""

    def __init__(self, data: Tensor, rows: Sequence[Row]) -> None:
        self.data, self.rows = data, rows

    def part(self, data: Tensor) -> Memory:
        return Memory(data, self.rows)

    def index(self, i: Any) -> Memory:
        assert 0 <= int(i) < len(self.data)
        return self.part(self.data[int(i)])

    def permute(self, order: Sequence[int]) -> Memory:
        return self.part(self.data.permute(*order))

    def mine(self) -> Sequence[Row]:
        size = self.data.untyped_storage().nbytes() // self.data.itemsize // len(self.rows)
        first = self.data.storage_offset()
        return self.rows[first // size : (first + self.data.numel() - 1) // size + 1]

    def read(self, by: Task) -> Tensor:
        for row in self.mine():
            row.read(by)
        return self.data

    def load(self, layout: object) -> Value:
        return value(self.read(RUNNING.task).clone())

    def store(self, values: Tensor) -> None:
        assert (values.shape, values.dtype) == (self.data.shape, self.data.dtype)
        for row in self.mine():
            row.store(RUNNING.task)
        self.data.copy_(values)


def init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


MBARRIER = SimpleNamespace(
    init=init,
    wait=Barrier.wait,
    arrive=lambda barrier, count: barrier.less(count, 0),
    expect=lambda barrier, size: barrier.less(1, -int(size)),
    MBarrierLayout=lambda: None,
)


def window(descriptor: Any, coordinates: Sequence[Any]) -> Tensor:
    """What of a descriptor's tensor lies at some coordinates; less where the tensor ends."""
    whole = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    row, column = (int(c) for c in coordinates)
    rows, columns = descriptor.block_shape
    return whole[row : row + rows, column : column + columns]


def copy_in(descriptor: Any, coordinates: Sequence[Any], barrier: Barrier, memory: Memory) -> None:
    assert list(memory.data.shape) == list(descriptor.block_shape)
    found = window(descriptor, coordinates)
    copier = helper()
    for row in memory.mine():
        row.copy(copier)
    memory.data.zero_()
    memory.data[: found.shape[0], : found.shape[1]] = found
    barrier.less(0, memory.data.nbytes, copier)


def copy_out(descriptor: Any, coordinates: Sequence[Any], memory: Memory) -> None:
    copier = helper()
    RUNNING.task.copies.append(copier)
    there = window(descriptor, coordinates)
    there.copy_(memory.read(copier)[: there.shape[0], : there.shape[1]])


class Product:
    """A matrix product that is under way: its result is NaN until it was waited for."""

    def __init__(self, by: Task, result: Value) -> None:
        self.by, self.result, self.shown = by, result, value(torch.full_like(result, torch.nan))

    def done(self) -> None:
        RUNNING.task.look(self.by.show())
        self.shown.copy_(self.result)


def product(a: Any, b: Memory, sums: Tensor, use_acc: bool = True, is_async: bool = False) -> Value:
    by, under_way = helper(), RUNNING.task.products
    first = a.read(by) if isinstance(a, Memory) else a
    assert first.dtype == b.data.dtype
    assert first.dtype in (torch.bfloat16, torch.float16)
    result = first.float() @ b.read(by).float()
    if use_acc:
        result += next((product.result for product in under_way if product.shown is sums), sums)
    under_way.append(Product(by, value(result)))
    return under_way[-1].shown if is_async else products_done(0, [under_way[-1].shown])


def products_done(pending: int, deps: Sequence[Any]) -> Any:
    under_way = RUNNING.task.products
    while len(under_way) > pending:
        under_way.pop(0).done()
    return deps[0] if len(deps) == 1 else tuple(deps)


def copies_done(pending: int) -> None:
    copies = RUNNING.task.copies
    while len(copies) > pending:
        RUNNING.task.look(copies.pop(0).show())


def load(pointer: Pointer, mask: Any = None, other: Any = 0, **_: Any) -> Value:
    places, flat = pointer.places(), pointer.base.view(-1)
    if mask is None:
        return value(flat[places].clone())
    there = mask.as_subclass(Tensor).broadcast_to(places.shape)
    return value(flat[torch.where(there, places, 0)].where(there, torch.tensor(other, dtype=flat.dtype)))


def store(pointer: Pointer, values: Any, mask: Any = None) -> None:
    places = pointer.places()
    values = torch.as_tensor(values).as_subclass(Tensor).broadcast_to(places.shape)
    assert values.dtype == pointer.base.dtype
    if mask is not None:
        there = mask.as_subclass(Tensor).broadcast_to(places.shape)
        places, values = places[there], values[there]
    assert not places.numel() or places.min() >= 0
    pointer.base.view(-1)[places] = values


def atomic(pointer: Pointer, values: Any, change: Callable[[Any, Any], Any]) -> Value:
    old = load(pointer)
    store(pointer, value(change(old, values)).int())
    return old


def where(condition: Any, a: Any, b: Any) -> Value:
    return value(torch.where(torch.as_tensor(condition), a, b))


def warp_specialize(tasks: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, registers: Any) -> None:
    failures: list[str] = []
    begun = RUNNING.task.show()
    running: list[Task] = []

    def run(task: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        RUNNING.task = Task(begun)
        running.append(RUNNING.task)
        try:
            with torch.no_grad():
                task(*arguments)
            assert not RUNNING.task.copies, "a task ends while shared memory is being copied"
        except BaseException:  # of any kind, to be raised in the thread that waits
            failures.append(traceback.format_exc())
            Barrier.broken.set()

    threads = [threading.Thread(target=run, args=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Barrier.broken.clear()
    assert not failures, failures[0]
    for task in running:
        RUNNING.task.look(task.show())


def allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Any:
    if dtype == torch.int64:
        return Barriers(shape[0])
    data = torch.empty(*shape, dtype=dtype)
    rows = [Row() for _ in range(shape[0] if len(shape) > 1 else 1)]
    return Memory(data.fill_(torch.nan) if dtype.is_floating_point else data, rows)


def nothing(*_: object, **__: object) -> None:
    """A layout, a fence, or a wait for what is done at once."""


def language(programs: Sequence[int]) -> SimpleNamespace:
    """What kernels know as gl, but for the program's place in the grid."""
    names = "SliceLayout BlockedLayout NVMMADistributedLayout DotOperandLayout SwizzledSharedLayout NVMMASharedLayout"
    dtypes = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.int32)}
    return SimpleNamespace(
        **dict.fromkeys(names.split(), nothing), **dtypes, int64=torch.int64, constexpr=lambda x: x,
        num_programs=lambda axis: value(programs[axis]), static_range=range,
        arange=lambda start, end, layout: value(torch.arange(start, end, dtype=torch.int32)),
        full=lambda shape, x, dtype, layout: value(torch.full([int(n) for n in shape], x, dtype=dtype)),
        zeros=lambda shape, dtype, layout: value(torch.zeros([int(n) for n in shape], dtype=dtype)),
        expand_dims=torch.unsqueeze, zeros_like=torch.zeros_like, exp2=torch.exp2, log2=torch.log2, abs=torch.abs,
        maximum=lambda a, b: where(a > b, a, b), minimum=lambda a, b: where(a < b, a, b),
        sum=lambda x, axis: x.sum(axis), max=lambda x, axis: x.amax(axis), where=where, load=load, store=store,
        atomic_add=lambda pointer, x, **_: atomic(pointer, x, lambda a, b: a + b),
        atomic_xchg=lambda pointer, x, **_: atomic(pointer, x, lambda a, b: b),
        convert_layout=lambda x, layout: x, allocate_shared_memory=allocate, warp_specialize=warp_specialize,
    )  # fmt: skip


def view(memory: Memory, shape: Sequence[int], layout: object) -> Memory:
    return memory.part(memory.data.view(*shape))


def kernels(module: ModuleType, gl: SimpleNamespace) -> ModuleType:
    """The module's kernels as plain functions."""

    def jit(function: Any = None, **_: object) -> Any:
        return (lambda f: f) if function is None else function

    support = SimpleNamespace(
        gl=gl, gluon=SimpleNamespace(jit=jit), barrier=nothing, copy_in=copy_in, copy_out=copy_out, view=view
    )
    hopper = SimpleNamespace(
        fence_async_shared=lambda: RUNNING.task.fence(), mbarrier=MBARRIER, warpgroup_mma=product,
        tma=SimpleNamespace(store_wait=copies_done),
        warpgroup_mma_wait=products_done,
    )  # fmt: skip
    launches = SimpleNamespace(gdc_wait=nothing, gdc_launch_dependents=nothing)
    replaced = {
        "mambalm.ops.gluon_support": support,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        "triton.language.extra.cuda": launches,
    }
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location("interpreted", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, replaced):  # type: ignore[arg-type]
        spec.loader.exec_module(found)
    return found


def launch(module: ModuleType, kernel: Any, programs: Sequence[int], arguments: dict[str, Any]) -> None:
    """In place of `triton_support.launch`, for a kernel of the module on a grid of programs."""

    def argument(parameter: Any) -> Any:
        given = arguments[parameter.name]
        if isinstance(given, Tensor):
            assert given.is_contiguous()
            return Pointer(given)
        return value(given) if isinstance(given, int) and not parameter.is_constexpr else given

    gl = language(programs)
    function = getattr(kernels(module, gl), kernel.fn.__name__)
    for program in product_of(*map(range, programs)):
        gl.program_id = lambda axis, program=program: value(program[axis])
        RUNNING.task = Task({})
        function(*(argument(parameter) for parameter in kernel.params))
