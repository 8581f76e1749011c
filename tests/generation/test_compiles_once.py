"""Nothing compiles in a loop that somebody times: after a first small call the kernels know all that others bring."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from numba.core.dispatcher import Dispatcher

from mambalm.generation import Sampling, Settings, decode
from mambalm.models.common import MambalmForCausalLM
from mambalm.quantization.model import quantize_model
from tests.models.tiny import FAMILIES, STOCK, tokens


def compiled() -> dict[str, int]:
    """For how many signatures each kernel of ours is there, compiled now or read from the cache."""
    kernels = [found for found in gc.get_objects() if isinstance(found, Dispatcher)]
    names = [(f"{kernel.py_func.__module__}.{kernel.py_func.__qualname__}", kernel) for kernel in kernels]
    return {name: len(kernel.signatures) for name, kernel in names if name.startswith("mambalm.")}


@torch.no_grad()
def read(model: MambalmForCausalLM, rows: int, length: int) -> None:
    ids = tokens(rows, length)
    state = model(ids, cache_params=model.init_state(rows), use_cache=True).cache_params
    model(ids[:, :1], cache_params=state, use_cache=True)
    model(ids)


def write(model: MambalmForCausalLM, rows: int, length: int) -> None:
    for temperature in (0.0, 1.0):
        settings = Settings(max_new_tokens=3, sampling=Sampling(temperature=temperature))
        list(decode(model, list(tokens(rows, length)), settings))


def train(model: MambalmForCausalLM, rows: int, length: int) -> None:
    ids = tokens(rows, length)
    model(ids, labels=ids).loss.backward()
    model(ids, labels=ids, skip_logits=True).loss.backward()
    packed = torch.tensor([0, length // 2, length], dtype=torch.int32)
    model(ids[:1], cu_seqlens=packed).logits.sum().backward()


CALLS: dict[str, Callable[[MambalmForCausalLM, int, int], None]] = {"read": read, "write": write, "train": train}


def check(model: MambalmForCausalLM, call: str) -> None:
    CALLS[call](model, 1, 5)
    known = compiled()
    assert sum(known.values()) > 0
    for rows, length in ((1, 1), (3, 40), (2, 130), (1, 300)):
        CALLS[call](model, rows, length)
        assert compiled() == known, (rows, length)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_the_first_call_nothing_compiles(name: str, dtype: torch.dtype, call: str) -> None:
    check(FAMILIES[name].model().to(dtype), call)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_nor_in_a_quantised_model(quantization: str) -> None:
    model = FAMILIES["mamba"].model(hidden_size=64, time_step_rank=16).to(torch.bfloat16)
    quantize_model(model, quantization)
    check(model, "read")
    check(model, "write")
