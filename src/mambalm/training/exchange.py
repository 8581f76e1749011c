"""FSDP2's exchanges between GPUs of one host by their copy engines, beside which products have every multiprocessor.

NCCL's kernels hold some until all ranks have come, and a product that begins meanwhile waits for these. Here ranks copy
out of and into memory that all of them map, and meet in a kernel of one warp.
"""

from __future__ import annotations

import math
import socket
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def by_copies(groups: Iterable[FSDPModule], ranks: dist.ProcessGroup, *, sums: bool) -> None:
    """Let the shards of these groups be exchanged so: the weights, and with ``sums``, in float32, the gradients."""
    gather: Any = Gather(ranks)
    scatter: Any = ReduceScatter(ranks)
    for group in groups:
        group.set_custom_all_gather(gather)
        if sums:
            group.set_custom_reduce_scatter(scatter)


def refusal(ranks: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why these ranks cannot exchange so, the same on all of them, which all have to ask; None if they can."""
    if reason := _first(_unreachable(ranks, device), ranks):
        return reason
    try:
        Shared(ranks.size(), torch.uint8, device, ranks)
    except RuntimeError as error:
        return _first(f"they cannot map each other's memory: {error}", ranks)
    return _first(None, ranks)


def _unreachable(ranks: dist.ProcessGroup, device: torch.device) -> str | None:
    hosts: list[str | None] = [None] * ranks.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=ranks)
    if len(set(hosts)) > 1:
        return f"they are on {len(set(hosts))} hosts (parallel.mode=hsdp shards within each)"
    if device.type != "cuda":
        return f"they are on {device.type}"
    for other in range(torch.cuda.device_count()):
        if other != device.index and not torch.cuda.can_device_access_peer(device, other):
            return f"GPU {device.index} has no access to the memory of GPU {other}"
    return None


def _first(reason: str | None, ranks: dist.ProcessGroup) -> str | None:
    """The first of the ranks' reasons."""
    reasons: list[str | None] = [None] * ranks.size()
    dist.all_gather_object(reasons, reason, group=ranks)
    return next(filter(None, reasons), None)


class Shared:
    """A tensor on every rank that all of them read and write.

    Attributes:
        own: this rank's, flat.
        of: each rank's, in as many parts as there are ranks: (ranks, numbers of a part).
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device, ranks: dist.ProcessGroup) -> None:
        """``count`` numbers for each rank; all ranks at once."""
        import torch.distributed._symmetric_memory as memory

        world = ranks.size()
        self.own = memory.empty(count, dtype=dtype, device=device)
        self._handle = memory.rendezvous(self.own, ranks)
        self.of = [self._handle.get_buffer(rank, (world, count // world), dtype) for rank in range(world)]

    def meet(self) -> None:
        """What comes behind this in the stream sees what all ranks did to it before they came here."""
        self._handle.barrier()


class _Slots:
    """Memory for as many exchanges of one size as are under way."""

    def __init__(self, number: int, *of_each: Any) -> None:
        self._slots, self._turn = [Shared(*of_each) for _ in range(number)], 0

    def next(self) -> Shared:
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        return slot


class _Exchange:
    """What both directions have: slots by size, made at the first exchange of it."""

    NUMBER: int

    def __init__(self, ranks: dist.ProcessGroup) -> None:
        rank, world = ranks.rank(), ranks.size()
        self._ranks, self._rank = ranks, rank
        # Each from another on, so that they do not all go to one.
        self._others = [(rank + step) % world for step in range(1, world)]
        self._slots: dict[tuple[int, torch.dtype], _Slots] = {}

    def _next(self, count: int, dtype: torch.dtype, device: torch.device) -> Shared:
        if (count, dtype) not in self._slots:
            self._slots[count, dtype] = _Slots(self.NUMBER, count, dtype, device, self._ranks)
        return self._slots[count, dtype].next()


class Gather(_Exchange):
    """FSDP2's all-gather: each rank lays its shard into its slot, and copies the others' shards from theirs."""

    # One is read out and one is filled at a time. Of the third the others have copied what they need when they come to
    # the gather but one after it.
    NUMBER = 3

    def __init__(self, ranks: dist.ProcessGroup) -> None:
        """Among these ranks."""
        super().__init__(ranks)
        self._lent: dict[int, tuple[Shared, weakref.ref[Tensor]]] = {}
        self._done: deque[Any] = deque(maxlen=self.NUMBER - 1)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A slot for all shards, which FSDP2 lays this rank's into.

        Raises:
            RuntimeError: the slots are still in use.
        """
        slot = self._next(math.prod(size), dtype, device)
        address = slot.own.data_ptr()
        if address in self._lent and self._lent[address][1]() is not None:
            raise RuntimeError(f"more than {self.NUMBER} groups are gathered at once: prefetch one group at a time")
        if len(self._done) == self._done.maxlen:
            torch.get_device_module(device).current_stream().wait_event(self._done[0])
        lent = slot.own.view(tuple(size))
        self._lent[address] = slot, weakref.ref(lent)
        return lent

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill the slot ``output_tensor``, of which ``input_tensor`` is this rank's part."""
        slot, _ = self._lent[output_tensor.data_ptr()]
        slot.meet()
        for other in self._others:
            slot.of[self._rank][other].copy_(slot.of[other][other])
        self._done.append(torch.get_device_module(output_tensor.device).current_stream().record_event())


class ReduceScatter(_Exchange):
    """FSDP2's reduce-scatter: each rank lays into every slot that rank's part of its gradients, to be averaged there.

    They are averaged in their dtype, in the order of the ranks.
    """

    # When a rank comes to an exchange, it has read out the one before.
    NUMBER = 2

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of one's own, for gradients and averages."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Average all ranks' parts of this one into ``output_tensor``."""
        if op != dist.ReduceOp.AVG:
            raise ValueError(f"gradients are averaged by copies, not reduced by {op}")
        slot = self._next(input_tensor.numel(), input_tensor.dtype, input_tensor.device)
        parts = input_tensor.view(self._ranks.size(), -1)
        for other in (*self._others, self._rank):
            slot.of[other][self._rank].copy_(parts[other])
        slot.meet()
        torch.mean(slot.of[self._rank], dim=0, out=output_tensor)
