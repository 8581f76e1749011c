"""ssd's Gluon kernels, run on a CPU by an interpreter of the tests, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from mambalm.ops.ssd import _gluon_kernels, gluon  # noqa: E402
from mambalm.ops.ssd import triton as plain  # noqa: E402
from tests.helpers import gradients, relative_error  # noqa: E402
from tests.ops import gluon_interpreter  # noqa: E402
from tests.ops.ssd_helpers import arguments, doubled, output_weights, scan  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="what is plain Triton is interpreted too")


@pytest.fixture
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gluon backend in place of plain Triton's, its kernels interpreted, its memory full of NaN."""

    def launch(kernel: Any, programs: int, given: dict[str, Any], options: dict[str, Any]) -> None:
        gluon_interpreter.launch(_gluon_kernels, kernel, (programs,), given)

    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        t = empty(*shape, **options)
        return t.fill_(torch.nan) if t.is_floating_point() else t

    monkeypatch.setattr(gluon, "launch", launch)
    monkeypatch.setattr(torch, "empty", poisoned)
    for name in ("forward", "backward"):
        monkeypatch.setattr(plain, name, getattr(gluon, name))


@pytest.mark.usefixtures("_on_a_cpu")
@pytest.mark.parametrize(
    ("b", "l", "h", "g", "offsets"),
    [
        (1, 128, 2, 1, None),
        (2, 70, 4, 2, None),
        (1, 150, 3, 1, None),  # heads without a partner
        (1, 70, 8, 1, None),  # more than what is copied ahead
        (1, 200, 2, 1, [0, 0, 70, 130, 130, 200]),
    ],
)
def test_against_reference(
    b: int, l: int, h: int, g: int, offsets: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gluon, "processors", lambda device: 3)  # ranges that end within a row
    args = arguments(b, l, h, 64, 128, g, rows=None if offsets is None else len(offsets) - 1, dtype=torch.bfloat16)
    weights = output_weights(args)
    del args["z"]
    exact = gradients(scan("reference", offsets, chunk_size=None), doubled(args), weights)
    rounded = gradients(scan("reference", offsets, chunk_size=None), args, weights)
    found = gradients(scan("triton", offsets, chunk_size=None), args, weights)
    for name, value in found.items():
        if name != "out1":  # the final state: float32, of rounded products
            # Twice is the rule; where it is plain Triton that stores, the interpreter rounds towards zero.
            assert relative_error(value, exact[name]) <= 2.3 * relative_error(rounded[name], exact[name]), name
    assert relative_error(found["out1"], exact["out1"]) <= 2 * torch.finfo(torch.bfloat16).eps
