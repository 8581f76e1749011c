"""The causal convolution against its floor and peer: `python -m benchmarks.causal_conv1d`.

bfloat16, k = 4, bias and silu; x is half of a projection's rows, as a layer gives it. The floor is x and y once through
memory; in the backward x, dy and dx. The peer is causal_conv1d 1.6.1 in its own layout, on the same kind of GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.memory_bound import measure, write
from mambalm.ops import causal_conv1d

# (b, d, l) and the peer's milliseconds, forward and backward.
SHAPES = {
    (8, 5120, 2048): (0.095, 0.210),
    (8, 5120, 2047): (None, None),
    (1, 8192, 8192): (0.074, 0.132),
    (8, 1536, 2048): (0.033, 0.203),
    (1, 1536, 2048): (0.008, 0.112),
}


def rows() -> list[dict[str, Any]]:
    """One per shape."""
    function = partial(causal_conv1d, activation="silu", backend="triton")
    found = []
    for (b, d, l), peer in SHAPES.items():
        draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        arguments = {"x": draw(b, l, 2 * d)[..., :d], "weight": draw(d, 4), "bias": draw(d)}
        found.append({"b": b, "d": d, "l": l, **measure(function, arguments, (2, 3), 2 * b * d * l), "peer_ms": peer})
    return found


if __name__ == "__main__":
    write("causal_conv1d", Case("causal_conv1d", {"b": 2, "l": 67, "d": 48, "k": 4}), rows)
