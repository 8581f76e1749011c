"""What a backend of the selective scan is given, in this order."""

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """Shapes as in the interface, B and C with their group axis (b, l, g, n)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
