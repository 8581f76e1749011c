"""Several threads that generate with one model at once, each as it would alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mambalm.diagnostics.tiny import VOCABULARY, tiny_models
from mambalm.generation import Engine, Sampling, Session, Settings
from mambalm.models.common import MambalmForCausalLM
from mambalm.quantization.model import quantize_model

SAMPLING = Sampling(temperature=1.0, top_k=8, repetition_penalty=1.2)


def batch(engine: Engine, seed: int) -> list[tuple[int, int]]:
    """Up to five rows, which stop at different places."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(VOCABULARY, (3 + 7 * row,), generator=generator) for row in range(1 + seed % 5)]
    settings = Settings(sampling=SAMPLING, seed=seed, max_new_tokens=8, end_tokens=frozenset({3, 7}))
    return [(token.row, token.id) for token in engine.generate(prompts, settings)]


def session(model: MambalmForCausalLM, seed: int) -> list[int]:
    reader = Session(model, chunk_size=8)
    reader.read(torch.randint(VOCABULARY, (30,), generator=torch.Generator().manual_seed(seed)).tolist())
    return list(reader.write(Settings(sampling=SAMPLING, seed=seed, max_new_tokens=8)))


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", ["Mamba", "Mamba-2 with attention"])
def test_threads_do_not_see_each_other(name: str, quantization: str | None) -> None:
    model = tiny_models()[name]
    if quantization is not None:
        quantize_model(model, quantization)
    engine = Engine(model)
    alone = [batch(engine, seed) for seed in range(6)], [session(model, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        batches = [pool.submit(batch, engine, seed) for seed in range(6)]
        sessions = [pool.submit(session, model, seed) for seed in range(4)]
        together = [future.result() for future in batches], [future.result() for future in sessions]
    assert together == alone
