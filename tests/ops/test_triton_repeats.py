"""Calls made again from what the first one noted: interpreted on a CPU, by the GPU where there is one."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from mambalm.ops import triton_repeats, triton_sums, triton_support  # noqa: E402
from mambalm.ops.causal_conv1d import triton as convolution  # noqa: E402
from mambalm.ops.rms_norm import triton as norm  # noqa: E402
from mambalm.ops.selective_scan import _launch as scan_launch  # noqa: E402
from mambalm.ops.selective_scan import triton as scan  # noqa: E402
from mambalm.ops.ssd import _gluon_kernels, gluon  # noqa: E402
from mambalm.ops.ssd import triton as plain  # noqa: E402
from tests.ops import gluon_interpreter  # noqa: E402
from tests.ops.ssd_helpers import arguments  # noqa: E402

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)]
if triton.knobs.runtime.interpret:
    DEVICES.append(pytest.param("cpu"))
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def at(address: int, shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
    """A tensor at an address."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def interpret(kernel: Any, programs: int, values: Any, options: dict[str, Any]) -> None:
    if hasattr(_gluon_kernels, kernel.__name__) and kernel is getattr(_gluon_kernels, kernel.__name__):
        given = dict(zip(kernel.arg_names, values, strict=True))
        gluon_interpreter.launch(_gluon_kernels, kernel, (programs,), given)
    else:
        kernel[(programs,)](*values, **options)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, device: str) -> list[str]:
    """The kernels that were launched on the long way. On a CPU the interpreter, which wants tensors, is given those
    that lie at the addresses."""
    names: list[str] = []
    real = triton_support.launch

    def launch(kernel: Any, programs: int, given: dict[str, Any], options: dict[str, Any]) -> None:
        names.append(kernel.__name__)
        if device != "cpu":
            return real(kernel, programs, given, options)
        values = [given[name] for name in kernel.arg_names]
        kinds = [(v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else None for v in values]

        def again(*values: Any) -> None:
            found = list(values)
            for i, (value, kind) in enumerate(zip(values, kinds, strict=True)):
                if kind is not None:
                    found[i] = at(value, *kind)
                elif hasattr(value, "block_shape"):
                    base = at(value.base.data_ptr(), value.shape, value.strides, value.base.dtype)
                    found[i] = SimpleNamespace(**vars(value) | {"base": base})
            interpret(kernel, programs, found, options)

        interpret(kernel, programs, values, options)
        if (notes := getattr(triton_support._here, "notes", None)) is not None:
            notes.launched(again, values)
        return None

    for module in (gluon, plain, triton_sums, convolution, norm, scan_launch):
        monkeypatch.setattr(module, "launch", launch)
    if device == "cpu":
        monkeypatch.setattr(gluon, "processors", lambda device: 3)
    monkeypatch.setattr(triton_repeats, "_plans", {})
    return names


def drawn(device: str, given: dict[str, Any], offsets: list[int] | None = None) -> tuple[Any, ...]:
    """Arguments of a forward, without a gate unless there is one."""
    args = {name: t.to(device) for name, t in arguments(**given).items()}
    packed = None if offsets is None else torch.tensor(offsets, dtype=torch.int32, device=device)
    tensors = [args[name] for name in NAMES]
    if given["dtype"] == torch.bfloat16:
        tensors[NAMES.index("z")] = None
    return (*tensors, True, 0.0, float("inf"), args["initial_state"], packed, None)


BFLOAT16 = {"b": 2, "l": 70, "h": 4, "p": 64, "n": 128, "g": 2, "dtype": torch.bfloat16}
PACKED = {"b": 1, "l": 130, "h": 2, "p": 64, "n": 128, "rows": 3, "dtype": torch.bfloat16}
FLOAT32 = {"b": 1, "l": 35, "h": 2, "p": 3, "n": 5, "dtype": torch.float32}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("backend", "given", "offsets"),
    [
        ("gluon", BFLOAT16, None),
        ("gluon", PACKED, [0, 0, 70, 130]),
        ("triton", FLOAT32, None),
        ("triton", FLOAT32 | {"l": 1}, None),
    ],
)
def test_the_same_on_other_tensors(
    backend: str, given: dict[str, Any], offsets: list[int] | None, device: str, launched: list[str]
) -> None:
    module: Any = gluon if backend == "gluon" else plain
    for _ in range(2):
        inputs = drawn(device, given, offsets)
        y, state, _ = module.forward(*inputs, final=True, save=True)
        dy, dstate = torch.randn_like(y), torch.randn_like(state)
        gradients = module.backward(dy, dstate, *inputs, None)
        before, launched[:] = list(launched), []
    assert before == [], "what was noted was not used"
    expected = module._forward(True, *inputs)
    assert torch.equal(y, expected[0])
    assert torch.equal(state, expected[1])
    for found, exact in zip(gradients, module._backward(dy, dstate, *inputs), strict=True):
        assert (found is None) == (exact is None)
        assert found is None or (torch.equal(found, exact) and found.stride() == exact.stride())


@pytest.mark.parametrize("device", DEVICES)
def test_other_ops(device: str, launched: list[str]) -> None:
    """Also where an argument begins within a tensor, as a part of a projection does."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def all_of(x: Tensor, dy: Tensor, taps: Tensor, bias: Tensor, state: Tensor, A: Tensor) -> list[Tensor | None]:
        gate = x + 1
        scanned = (x, gate, A, x[:, :, None] * 2, x[:, :, None] * 3, bias, None, bias + 1, True, None, None)
        y, final, checkpoints = scan.forward(*scanned, save=True)
        return [
            *convolution.forward(x, taps, bias, True, state, None),
            *convolution.backward(dy, None, x, taps, bias, True, state, None),
            *norm.forward(x, bias, gate, None, 1e-5, 2, torch.float32),
            *norm.backward(dy, None, x, bias, gate, 1e-5, 2),
            *(y, final, checkpoints),
            *scan.backward(dy, final, *scanned, checkpoints),
        ]

    for _ in range(2):
        given = (drawn(2, 9, 8)[..., 4:], drawn(2, 9, 4), drawn(4, 3), drawn(4), drawn(2, 4, 2), -drawn(4, 4).abs())
        found = all_of(*given)
        before, launched[:] = list(launched), []
    assert before == [], "what was noted was not used"
    triton_repeats._plans.clear()
    again = all_of(*given)
    assert len(launched) == 7
    for result, exact in zip(found, again, strict=True):
        assert (result is None) == (exact is None)
        assert result is None or torch.equal(result, exact)


@pytest.mark.parametrize("device", DEVICES)
def test_what_cannot_be_made_again_is_called_for(device: str, launched: list[str]) -> None:
    """The copy of an argument that is not dense; two that were the same tensor, of which other calls have two."""
    inputs = list(drawn(device, FLOAT32))
    for change in ({2: inputs[2].repeat_interleave(2)[::2]}, {4: inputs[3]}):
        changed = [change.get(i, t) for i, t in enumerate(inputs)]
        for _ in range(2):
            launched.clear()
            y, _, _ = plain.forward(*changed, final=True, save=True)
        assert launched != []
        assert torch.equal(y, plain._forward(True, *changed)[0])
    launched.clear()
    assert torch.equal(plain.forward(*inputs, final=True, save=True)[0], plain._forward(True, *inputs)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_kinds_are_told_apart_and_forgotten(device: str, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_repeats, "_MOST", 2)
    for given in (FLOAT32, FLOAT32 | {"l": 36}, FLOAT32 | {"h": 3}, FLOAT32):
        launched.clear()
        inputs = drawn(device, given)
        y = plain.forward(*inputs, final=False, save=False)[0]
        assert launched != []
        assert torch.equal(y, plain._forward(False, *inputs)[0])
        assert len(triton_repeats._plans) <= 2
