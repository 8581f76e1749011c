"""Rounding a weight to 8 or 4 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops.numba_support import memory, parallel
from mambalm.quantization import _numba_kernels as kernels
from mambalm.quantization.layout import GROUP, MULTIPLE, ROWS, Packed, pack

_RANGE = {8: (-127, 127), 4: (-8, 7)}
# What the largest weight of a group becomes: fewer steps waste the range, more clip its neighbours of the other sign.
_STEPS_TRIED = {8: (127.0,), 4: (7.0, -8.0, 8.0, -7.0)}


def quantize(weight: Tensor, bits: int) -> Packed:
    """Round a weight (out_features, in_features) to the nearest multiples of its groups' scales.

    In 4 bits the scale of a group is the one of least squared error among those that map its largest weight to the
    ends of the range.

    Raises:
        ValueError: bits is neither 8 nor 4, or the weight is not finite.
    """
    if bits not in _RANGE:
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    if not bool(weight.isfinite().all()):
        raise ValueError("the weight has values that are not finite, which no scale can represent")
    out_features, in_features = weight.shape
    padding = (0, -in_features % MULTIPLE[bits], 0, -out_features % ROWS)
    groups = F.pad(weight.detach().float(), padding).unflatten(1, (-1, GROUP))
    values = torch.empty(groups.shape, dtype=torch.int8)
    scales = torch.empty(groups.shape[:2], dtype=torch.bfloat16)
    choices = (torch.tensor(_STEPS_TRIED[bits]).numpy(), torch.tensor(_RANGE[bits], dtype=torch.float32).numpy())
    outputs = (values.flatten(0, 1).numpy(), memory(scales.flatten()))
    parallel(kernels.quantize, scales.numel(), groups.numel(), (groups.flatten(0, 1).numpy(), *choices, *outputs))
    return pack(values, scales, bits, out_features, in_features)
