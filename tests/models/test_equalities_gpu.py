"""The equalities of whole models by the kernels of a GPU, gradients and states included."""

from __future__ import annotations

import pytest
from torch import Tensor

from mambalm import ops
from mambalm.models.common import MambalmForCausalLM
from tests.helpers import assert_close, assert_no_worse
from tests.models.forms import Read, alone, exact, in_chunks, joined, outcome, packed, padded
from tests.models.tiny import ATTENTION, FAMILIES

pytestmark = pytest.mark.gpu

# Sizes that the kernels take.
SIZES = {
    "mamba": {"hidden_size": 64, "state_size": 16},
    "falcon_mamba": {"hidden_size": 64, "intermediate_size": 160, "state_size": 16},
    "mamba2": {"hidden_size": 128, "num_heads": 8, "head_dim": 32, "n_groups": 2, "state_size": 64, "chunk_size": 64},
    "hybrid": {
        "hidden_size": 64,
        "d_intermediate": 96,
        "attn_cfg": ATTENTION | {"head_dim": 16, "d_conv": 4},
        "ssm_cfg": {"layer": "Mamba2", "d_state": 32, "headdim": 32},
    },
}
WAYS: dict[str, tuple[Read, list[int]]] = {
    "chunks": (in_chunks([0, 100, 100, 101, 300]), [300, 300]),
    "tokens": (in_chunks(list(range(13))), [12, 12]),
    "left": (padded(True, 2), [300, 1, 77]),
    "right": (padded(False, 1, 3), [300, 1, 77]),
    "packed": (packed, [300, 1, 77]),
}


def exact_by_torch(model: MambalmForCausalLM, lengths: list[int]) -> dict[str, Tensor]:
    with ops.use_backend("portable"):
        return exact(model, lengths, 3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_float32(name: str, way: str) -> None:
    model = FAMILIES[name].model(**SIZES[name]).cuda()
    form, lengths = WAYS[way]
    assert_close(outcome(model, form, lengths, 3), exact_by_torch(model, lengths))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16(name: str, way: str) -> None:
    model = FAMILIES[name].model(residual_in_fp32=False, **SIZES[name]).cuda().bfloat16()
    form, lengths = WAYS[way]
    with ops.use_backend("reference"):
        rounded = outcome(model, alone, lengths, 3)
    truth = exact_by_torch(model, lengths)
    assert_no_worse(*(joined(found, truth) for found in (outcome(model, form, lengths, 3), rounded, truth)))
