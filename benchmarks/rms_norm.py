"""The normalisation against the floor of its bytes: `python -m benchmarks.rms_norm`.

bfloat16, float32 weight, 16,384 tokens; plain, gated, and with a float32 residual stream. The floor is every tensor of
the tokens once through memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.memory_bound import measure, write
from mambalm.ops import rms_norm

_TOKENS = 16384
# Bytes per element, forward and backward: bfloat16 tensors count 2, the float32 stream and its gradient 4.
VARIANTS = {"plain": (4, 6), "gate": (6, 10), "residual": (12, 14)}


def rows() -> list[dict[str, Any]]:
    """One per width and variant."""
    found = []
    for d in (768, 2560, 5120):
        for variant, passes in VARIANTS.items():
            draw = partial(torch.randn, _TOKENS, d, device="cuda")
            arguments = {"x": draw(dtype=torch.bfloat16), "weight": torch.ones(d, device="cuda")}
            if variant == "gate":
                arguments["gate"] = draw(dtype=torch.bfloat16)
            if variant == "residual":
                arguments["residual"] = draw()
            function = partial(rms_norm, residual_in_fp32=variant == "residual", backend="triton")
            found.append({"d": d, "variant": variant, **measure(function, arguments, passes, _TOKENS * d)})
    return found


if __name__ == "__main__":
    write("rms_norm", Case("rms_norm", {"b": 2, "l": 67, "d": 48}), rows)
