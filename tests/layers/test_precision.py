"""What the ops receive: A, D and the step bias in float32 under autocast and under FSDP2, activations in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mambalm.layers import mamba as mamba_module
from mambalm.layers import mamba2 as mamba2_module
from tests.layers.cases import D_MODEL, build


class Recorder:
    """Stands before an op and notes the dtypes of its arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.op, self.arguments = getattr(module, name), ()
        monkeypatch.setattr(module, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.arguments = arguments
        return self.op(*arguments, **options)

    def dtypes(self, *indices: int) -> list[torch.dtype | None]:
        found = [self.arguments[i] for i in indices]
        return [None if tensor is None else tensor.dtype for tensor in found]


def test_mamba_precision_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, mamba_module, "selective_scan")
    layer = build("mamba")
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(torch.randn(2, 5, D_MODEL), return_state=True)
    assert recorder.dtypes(0, 1, 3, 4, 6) == [torch.bfloat16] * 5
    assert recorder.dtypes(2, 5, 7) == [torch.float32] * 3
    assert y.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    y.float().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_mamba2_precision_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, mamba2_module, "ssd")
    layer = build("mamba2")
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 5, D_MODEL)).float().sum().backward()
    assert recorder.dtypes(0, 1, 3, 4) == [torch.bfloat16] * 4
    assert recorder.dtypes(2, 5, 7) == [torch.float32] * 3
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize(("dtype", "left"), [(torch.bfloat16, None), (torch.float32, torch.float32)])
def test_half_precision_step_projection_is_called_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, left: torch.dtype | None
) -> None:
    recorder = Recorder(monkeypatch, mamba_module, "selective_scan")
    layer = build("mamba").to(dtype)
    layer(torch.randn(2, 5, D_MODEL, dtype=dtype))
    assert recorder.dtypes(2, 5, 7) == [torch.float32, torch.float32, left]
    delta = layer.dt_proj(torch.ones(1, layer.dt_rank, dtype=dtype))
    whole = F.linear(torch.ones(1, layer.dt_rank, dtype=dtype), layer.dt_proj.weight, layer.dt_proj.bias)
    assert torch.equal(delta, whole) == (left is None)


@pytest.mark.parametrize(
    ("name", "module", "op"), [("mamba", mamba_module, "selective_scan"), ("mamba2", mamba2_module, "ssd")]
)
def test_precision_under_fsdp2(
    monkeypatch: pytest.MonkeyPatch, mesh: DeviceMesh, name: str, module: Any, op: str
) -> None:
    """The large projections are one group, in bfloat16; the rest of the mixer is another, in float32."""
    recorder = Recorder(monkeypatch, module, op)
    layer = build(name)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    large = [child for part, child in layer.named_children() if part in ("in_proj", "x_proj", "out_proj")]
    fully_shard(large, mesh=mesh, mp_policy=half)
    fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    y = layer(torch.randn(2, 5, D_MODEL))
    assert recorder.dtypes(2, 5, 7) == [torch.float32] * 3
    assert recorder.dtypes(0, 1, 3, 4) == [torch.bfloat16] * 4
    y.float().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
