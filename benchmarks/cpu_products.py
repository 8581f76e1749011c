"""Weight times vector on a CPU, our kernels beside torch's: `python -m benchmarks.cpu_products [--threads N]`.

Prints the gigabytes of weights that each reads per second, medians over rounds in which all take turns. There are
enough weights of each shape that none stays in the cache between its turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops.numba_team import JobList, Team
from mambalm.quantization import products
from mambalm.quantization.layout import GROUP
from mambalm.quantization.schemes import quantize

SHAPES = ((3072, 768), (768, 1536), (50280, 768))
BYTES = 256 * 2**20  # of float32 weights, and less in few bits


def sides(weights: list[Tensor], x: Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """For each kernel a function that multiplies all weights with x, and the bytes that it reads."""
    out, column = torch.empty(1, weights[0].shape[0]), x[None]
    team = Team()
    half, rows = [weight.bfloat16() for weight in weights], column.bfloat16()
    found: dict[str, tuple[Callable[[], object], int]] = {}

    def ours(name: str, jobs: list[list], size: int) -> None:
        job_list = JobList([job for few in jobs for job in few])
        found[f"ours {name}"] = (lambda: job_list.run(team), size)

    count = sum(weight.numel() for weight in weights)
    ours("float32", [products.plain(weight, None, column, out) for weight in weights], 4 * count)
    ours("bfloat16", [products.plain(weight, None, column, out) for weight in half], 2 * count)
    for bits in (8, 4):
        packed = [quantize(weight, bits) for weight in weights]
        size = sum(part.values.nbytes + part.scales.nbytes for part in packed)
        ours(f"int{bits}", [products.packed(part, None, column, out) for part in packed], size)
    found["torch float32"] = (lambda: [F.linear(column, weight) for weight in weights], 4 * count)
    found["torch bfloat16"] = (lambda: [F.linear(rows, weight) for weight in half], 2 * count)
    eight = [(weight * 10).round().clamp(-127, 127).to(torch.int8) for weight in weights]
    scales = torch.rand(weights[0].shape[0]).bfloat16()
    multiply = torch.ops.aten._weight_int8pack_mm
    found["torch int8"] = (lambda: [multiply(rows, weight, scales) for weight in eight], count)
    if weights[0].shape[0] % 16 == 0:
        groups = torch.rand(weights[0].shape[1] // GROUP, weights[0].shape[0], 2).bfloat16()
        integers = [(weight * 2).round().clamp(-8, 7).to(torch.int32) + 8 for weight in weights]
        four = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight, 1) for weight in integers]
        small = torch.ops.aten._weight_int4pack_mm_for_cpu
        size = sum(weight.nbytes + groups.nbytes for weight in four)
        found["torch int4"] = (lambda: [small(rows, weight, GROUP, groups) for weight in four], size)
    return found


def main() -> None:
    """Time all of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_products", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for shape in SHAPES:
        weights = [torch.randn(shape) for _ in range(max(1, BYTES // (4 * shape[0] * shape[1])))]
        kernels = sides(weights, torch.randn(shape[1]))
        times: dict[str, list[float]] = {name: [] for name in kernels}
        for round in range(options.rounds + 1):
            for name, (call, _) in kernels.items():
                start = time.perf_counter()
                call()
                if round:  # the first warms up
                    times[name].append(time.perf_counter() - start)
        rates = {name: size / statistics.median(times[name]) / 1e9 for name, (_, size) in kernels.items()}
        print(shape, " ".join(f"{name}: {rate:.1f}" for name, rate in rates.items()), flush=True)


if __name__ == "__main__":
    main()
