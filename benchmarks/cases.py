"""The registry of cases: which op at which sizes, and random arguments as the layers give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mambalm import ops


@dataclass(frozen=True)
class Case:
    """An op at given sizes, by the letters of docs/notation.md."""

    op: str
    sizes: Mapping[str, int]

    @property
    def name(self) -> str:
        """Such as "b=1 l=2048 d=1536 n=16"."""
        return " ".join(f"{letter}={size}" for letter, size in self.sizes.items())

    def shrunk(self) -> Case:
        """The same case with odd, small sizes, for a comparison with the reference."""
        most = {"b": 2, "l": 67, "d": 48, "h": 4}
        return replace(self, sizes={letter: min(size, most.get(letter, size)) for letter, size in self.sizes.items()})

    def arguments(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """Random tensors by argument name: activations in `dtype`, the parameters of the scans in float32."""
        generator = torch.Generator().manual_seed(seed)

        def random(letters: str, dtype: torch.dtype = dtype) -> Tensor:
            shape = [self.sizes[letter] for letter in letters]
            return torch.randn(shape, generator=generator).to(device, dtype)

        return _ARGUMENTS[self.op](self, random)

    def call(self, arguments: Mapping[str, Tensor], backend: str | None = None) -> Tensor:
        """The op's output."""
        function: Callable[..., Any] = partial(getattr(ops, self.op), **_OPTIONS[self.op], backend=backend)
        output: Tensor = function(**arguments)
        return output


Random = Callable[..., Tensor]


def _selective_scan(case: Case, random: Random) -> dict[str, Tensor]:
    decay = -torch.arange(1.0, case.sizes["n"] + 1).repeat(case.sizes["d"], 1)
    u, delta, z, B, C = (random(letters) for letters in ("bld", "bld", "bld", "bln", "bln"))
    D, bias = random("d", torch.float32), random("d", torch.float32) - 4
    return {"u": u, "delta": delta, "A": decay.to(u.device), "B": B, "C": C, "D": D, "z": z, "delta_bias": bias}


def _ssd(case: Case, random: Random) -> dict[str, Tensor]:
    x, dt, B, C = (random(letters) for letters in ("blhp", "blh", "blgn", "blgn"))
    A, D, bias = -random("h", torch.float32).exp(), random("h", torch.float32), random("h", torch.float32) - 4
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": bias}


def _causal_conv1d(case: Case, random: Random) -> dict[str, Tensor]:
    return {"x": random("bld"), "weight": random("dk") / math.sqrt(case.sizes["k"]), "bias": random("d")}


def _rms_norm(case: Case, random: Random) -> dict[str, Tensor]:
    return {"x": random("bld"), "weight": random("d")}


_ARGUMENTS: dict[str, Callable[[Case, Random], dict[str, Tensor]]] = {
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "causal_conv1d": _causal_conv1d,
    "rms_norm": _rms_norm,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "selective_scan": {"delta_softplus": True},
    "ssd": {"dt_softplus": True},
    "causal_conv1d": {"activation": "silu"},
    "rms_norm": {},
}

# (b, l) of a layer of mamba-130m or mamba2-130m, and on a GPU of the 2.8b and 7b models as well.
CPU_CASES = (
    Case("selective_scan", {"b": 1, "l": 1024, "d": 1536, "n": 16}),
    Case("ssd", {"b": 1, "l": 1024, "h": 24, "p": 64, "g": 1, "n": 128}),
    Case("causal_conv1d", {"b": 1, "l": 1024, "d": 1536, "k": 4}),
    Case("rms_norm", {"b": 1, "l": 1024, "d": 768}),
)
GPU_CASES = (
    *(
        Case("selective_scan", {"b": b, "l": l, "d": d, "n": 16})
        for b, d, l in ((8, 5120, 2048), (1, 5120, 16384), (1, 8192, 8192), (8, 1536, 2048), (1, 1536, 2048))
    ),
    *(
        Case("ssd", {"b": b, "l": l, "h": h, "p": 64, "g": 1, "n": 128})
        for b, l, h in ((8, 2048, 80), (1, 16384, 80), (8, 2048, 24), (1, 2048, 80))
    ),
    *(
        Case("causal_conv1d", {"b": b, "l": l, "d": d, "k": 4})
        for b, d, l in ((8, 5120, 2048), (1, 8192, 8192), (8, 1536, 2048), (1, 1536, 2048))
    ),
    Case("rms_norm", {"b": 8, "l": 2048, "d": 2560}),
)
