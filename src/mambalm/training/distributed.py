"""Who takes part in a run: one process, or the ranks that torchrun started."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number.
        world: how many there are.
        device: where it computes.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over all ranks."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


def world_size() -> int:
    """The number of ranks that torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


@contextlib.contextmanager
def ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the other ranks for the block: NCCL between GPUs, Gloo between CPUs and for checkpoints.

    A rank that ends by an error ends the run: torchrun stops the others, and the last checkpoint is intact.

    Raises:
        RuntimeError: another rank has ended.
    """
    if not dist.is_torchelastic_launched():
        yield Ranks(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank()
    try:
        yield Ranks(rank, dist.get_world_size(), device)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise RuntimeError(
            f"rank {rank} lost the connection to another rank, which has ended and says why itself; the last "
            "checkpoint is intact, and the same command goes on from it"
        ) from error
    # A model of DDP that outlives the groups which it holds would wait for ever when it goes (seen on Gloo).
    gc.collect()
    # Not after an error: the other ranks are no longer at the same place, and waiting for them would hide it.
    dist.destroy_process_group()
