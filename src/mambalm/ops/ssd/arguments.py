"""What a backend of ssd is given, in this order."""

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """Shapes as in the interface."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    dt_min: float
    dt_max: float
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    chunk_size: int | None
