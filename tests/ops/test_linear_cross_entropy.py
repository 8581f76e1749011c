"""Cross-entropy without logits: hand-computed cases, torch's own as the reference, and its memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mambalm.ops import linear_cross_entropy
from tests.helpers import FLOAT32, assert_close, assert_no_worse, gradients

REDUCTIONS = ["mean", "sum", "none"]


def arguments(*shape: int, v: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """x (*shape), weight and bias, in ``dtype``; logits of a trained model's spread."""
    d = shape[-1]
    return {
        "x": torch.randn(shape, dtype=torch.float64).to(dtype),
        "weight": (torch.randn(v, d, dtype=torch.float64) * 2 * d**-0.5).to(dtype),
        "bias": torch.randn(v, dtype=torch.float64).to(dtype),
    }


def labels_for(x: Tensor, v: int) -> Tensor:
    """Random labels, about a third of them ignored."""
    labels = torch.randint(v, x.shape[:-1])
    return labels.masked_fill(torch.rand(x.shape[:-1]) < 0.3, -100)


def reference(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, z_loss: float, reduction: str) -> Tensor:
    """The definition, over the logits of all tokens at once, in the dtype of x until the statistics."""
    logits = F.linear(x, weight, bias).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
    losses = losses + z_loss * logits.logsumexp(1).square() * (labels.flatten() != -100)
    if reduction == "none":
        return losses.view(labels.shape)
    return losses.sum() / ((labels != -100).sum() if reduction == "mean" else 1)


def ours(labels: Tensor, reduction: str = "mean", z_loss: float = 0.01, chunk_size: int | None = 8) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(
            x, weight, labels, bias=bias, z_loss=z_loss, reduction=reduction, chunk_size=chunk_size
        )

    return run


def torchs(labels: Tensor, reduction: str = "mean", z_loss: float = 0.01) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference(x, weight, labels, bias, z_loss, reduction)

    return run


def output_weights(labels: Tensor, reduction: str) -> list[Tensor]:
    return [torch.randn(labels.shape if reduction == "none" else (), dtype=torch.float64)]


class TestByHand:
    """Logits 0 and log 3 for x = 1: the labels' probabilities are 1/4 and 3/4, and Z = 4; 1/2 and Z = 2 for x = 0."""

    x = torch.tensor([[1.0], [1.0], [0.0]])
    weight = torch.tensor([[0.0], [math.log(3)]])

    def loss(self, labels: list[int], **options: Any) -> list[float] | float:
        result: list[float] | float = linear_cross_entropy(
            self.x, self.weight, torch.tensor(labels), **options
        ).tolist()
        return result

    def test_reductions(self) -> None:
        each = [math.log(4), math.log(4 / 3), math.log(2)]
        assert self.loss([0, 1, 1], reduction="none") == pytest.approx(each)
        assert self.loss([0, 1, 1], reduction="sum") == pytest.approx(sum(each))
        assert self.loss([0, 1, 1]) == pytest.approx(sum(each) / 3)

    def test_z_loss(self) -> None:
        assert self.loss([0, -100, 1], z_loss=0.5) == pytest.approx(
            (math.log(4) + 0.5 * math.log(4) ** 2 + math.log(2) + 0.5 * math.log(2) ** 2) / 2
        )

    def test_bias(self) -> None:
        bias = torch.tensor([math.log(3), 0.0])
        assert self.loss([0, 0, 0], bias=bias, reduction="none") == pytest.approx([math.log(2)] * 2 + [math.log(4 / 3)])

    def test_ignored_labels(self) -> None:
        assert self.loss([7, 1, 7], ignore_index=7, reduction="none") == pytest.approx([0, math.log(4 / 3), 0])
        assert self.loss([7, 1, 7], ignore_index=7) == pytest.approx(math.log(4 / 3))

    def test_gradient(self) -> None:
        """p - onehot = (-3/4, 3/4) for x = 1 with label 0."""
        x, weight = self.x[:1].clone().requires_grad_(), self.weight.clone().requires_grad_()
        linear_cross_entropy(x, weight, torch.tensor([0])).backward()
        assert x.grad is not None
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, torch.tensor([[-0.75], [0.75]]))
        torch.testing.assert_close(x.grad, torch.tensor([[0.75 * math.log(3)]]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("names", [("x", "weight", "bias"), ("x", "weight"), ("x",), ("weight",)])
def test_gradcheck(reduction: str, z_loss: float, names: tuple[str, ...]) -> None:
    """Also when only some of the arguments want a gradient."""
    args = arguments(2, 5, 4, v=7)
    run = ours(labels_for(args["x"], 7), reduction, z_loss, chunk_size=4)
    leaves = [args[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *ts: run(**(args | dict(zip(names, ts, strict=True)))), leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 33, 19), (1, 1, 8), (3, 2, 5, 16), (300, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [8, None])
def test_against_torch(reduction: str, shape: tuple[int, ...], dtype: torch.dtype, chunk_size: int | None) -> None:
    args = arguments(*shape, v=101, dtype=dtype)
    labels = labels_for(args["x"], 101)
    labels.flatten()[:1] = 0  # at least one counts
    weights = output_weights(labels, reduction)
    exact = gradients(torchs(labels, reduction), {name: t.double() for name, t in args.items()}, weights)
    found = gradients(ours(labels, reduction, chunk_size=chunk_size), args, weights)
    assert found["out0"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(found[f"d{name}"].dtype == dtype for name in args)
    if dtype in (torch.float32, torch.float64):
        assert_close(found, exact, FLOAT32 if dtype == torch.float32 else 1e-12)
    else:
        assert_no_worse(found, gradients(torchs(labels, reduction), args, weights), exact)


@given(n=st.integers(0, 40), chunk_size=st.integers(1, 50), reduction=st.sampled_from(REDUCTIONS))
def test_any_chunk_size_gives_the_same(n: int, chunk_size: int, reduction: str) -> None:
    args = arguments(n, 6, v=11, dtype=torch.float32)
    labels = labels_for(args["x"], 11)
    weights = output_weights(labels, reduction)
    exact = gradients(ours(labels, reduction), {name: t.double() for name, t in args.items()}, weights)
    assert_close(gradients(ours(labels, reduction, chunk_size=chunk_size), args, weights), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_from_half_precision(dtype: torch.dtype) -> None:
    """The loss is that of the rounded inputs, in float32: logits rounded to half precision would show."""
    args = arguments(40, 32, v=50, dtype=dtype)
    labels = torch.randint(50, (40,))
    wide = ours(labels)(**{name: t.double() for name, t in args.items()})
    torch.testing.assert_close(ours(labels)(**args).double(), wide, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_keeps_float32(reduction: str) -> None:
    args = arguments(40, 32, v=50, dtype=torch.float32)
    args["x"] = args["x"].bfloat16()
    labels = labels_for(args["x"], 50)
    weights = output_weights(labels, reduction)
    plain = gradients(ours(labels, reduction), args, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(ours(labels, reduction), args, weights)
    assert {name: t.dtype for name, t in found.items()} == {
        "out0": torch.float32,
        "dx": torch.bfloat16,
        "dweight": torch.float32,
        "dbias": torch.float32,
    }
    assert_close(found, plain)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_predict_is_no_loss(reduction: str) -> None:
    args = arguments(2, 9, 4, v=7, dtype=torch.float32)
    labels = torch.full((2, 9), -100)
    found = gradients(ours(labels, reduction), args, output_weights(labels, reduction))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in found.values())


def test_vocabulary_entries_can_be_shut_off() -> None:
    """A bias of -inf, as for the padding of a vocabulary, gives no NaN."""
    args = arguments(9, 4, v=7)
    labels = torch.randint(5, (9,))
    few = args | {name: args[name][:5] for name in ("weight", "bias")}
    shut = args | {"bias": args["bias"].index_fill(0, torch.tensor([5, 6]), -math.inf)}
    weights = output_weights(labels, "mean")
    found, expected = (gradients(ours(labels), a, weights) for a in (shut, few))
    assert all(torch.equal(found[name][5:], torch.zeros_like(found[name][5:])) for name in ("dweight", "dbias"))
    assert_close(found | {name: found[name][:5] for name in ("dweight", "dbias")}, expected, 1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice(reduction: str) -> None:
    args = {name: t.requires_grad_() for name, t in arguments(20, 6, v=11).items()}
    loss = ours(labels_for(args["x"], 11), reduction)(**args).sum()
    first, second = (torch.autograd.grad(loss, list(args.values()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_derivative_is_refused(reduction: str) -> None:
    args = {name: t.requires_grad_() for name, t in arguments(20, 6, v=11).items()}
    loss = ours(labels_for(args["x"], 11), reduction)(**args).sum()
    (dx,) = torch.autograd.grad(loss, args["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy has no second derivative"):
        dx.square().sum().backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_strided_inputs(reduction: str) -> None:
    args = arguments(2, 20, 6, v=11)
    labels = labels_for(args["x"], 11)
    weights = output_weights(labels, reduction)
    expected = gradients(ours(labels, reduction), args, weights)
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in args.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    labels = torch.stack([labels, labels], dim=-1)[..., 0]
    assert_close(gradients(ours(labels, reduction), strided, weights), expected, tolerance=1e-13)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_as_one_graph(reduction: str, dynamic: bool) -> None:
    args = arguments(2, 10, 6, v=11, dtype=torch.float32)
    labels = labels_for(args["x"], 11)
    weights = output_weights(labels, reduction)
    compiled = torch.compile(ours(labels, reduction), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_close(gradients(compiled, args, weights), gradients(ours(labels, reduction), args, weights), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("summed", [True, False])
def test_custom_op_is_well_formed(summed: bool, dtype: torch.dtype) -> None:
    x, weight, bias = (t.requires_grad_() for t in arguments(10, 6, v=11, dtype=dtype).values())
    options = (-100, 0.1, 4, torch.float32, None, summed, [summed] * 3)
    # The check left out differentiates the gradients among the outputs, which is refused; compilation has its own test.
    torch.library.opcheck(
        torch.ops.mambalm.linear_cross_entropy.default,
        (x, weight, labels_for(x, 11), bias, *options),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shapes_without_data(reduction: str) -> None:
    args = {name: t.to("meta") for name, t in arguments(2, 9, 4, v=7).items()}
    loss = ours(torch.zeros(2, 9, dtype=torch.int64, device="meta"), reduction)(**args)
    assert loss.shape == ((2, 9) if reduction == "none" else ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 3)}, r"x must have shape \(..., l, d\) with weight's d = 4, got \(2, 8, 3\)"),
        ({"weight": torch.zeros(4)}, r"weight must have 2 axes \(v, d\), got shape \(4,\)"),
        ({"labels": torch.zeros(2, 7).long()}, r"labels must have shape \(..., l\) = \(2, 8\), got \(2, 7\)"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(v\) = \(9,\), got \(4,\)"),
        ({"weight": torch.zeros(9, 4, device="meta")}, "weight is on meta, x on cpu"),
        ({"labels": torch.full((2, 8), 9)}, r"labels must lie in \[0, 9\), .* ignore_index = -100, got 9"),
        ({"labels": torch.full((2, 8), -1)}, r"labels must lie in \[0, 9\), .* got -1"),
        ({"reduction": "max"}, "reduction must be one of mean, sum, none, got 'max'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    args = {"x": torch.zeros(2, 8, 4), "weight": torch.zeros(9, 4), "labels": torch.zeros(2, 8).long()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(args | change))


def test_labels_are_int64() -> None:
    with pytest.raises(TypeError, match=r"labels must be int64 on cpu, got torch\.int32 on cpu"):
        linear_cross_entropy(torch.zeros(8, 4), torch.zeros(9, 4), torch.zeros(8, dtype=torch.int32))


PEAKS = """
import json
from pathlib import Path
import torch
import torch.nn.functional as F
from mambalm.ops import linear_cross_entropy

torch.set_num_threads(1)
x, weight = torch.randn(8192, 8, requires_grad=True), torch.randn(8192, 8, requires_grad=True)
labels = torch.randint(8192, (8192,))


def peak():
    # Of this program: what getrusage tells includes the process that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


peaks = {}
for name, loss in {
    "first use": lambda: linear_cross_entropy(x[:300], weight, labels[:300]),
    "mean": lambda: linear_cross_entropy(x, weight, labels, z_loss=1e-4),
    "none": lambda: linear_cross_entropy(x, weight, labels, reduction="none").sum(),
    "torch": lambda: F.cross_entropy(x @ weight.T, labels),
}.items():
    before = peak()
    loss().backward()
    peaks[name] = peak() - before
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_stays_below_one_logits_matrix() -> None:
    """The growth of the process's peak in forward and backward; torch's own loss shows that the measure sees it."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    peaks = json.loads(done.stdout)
    matrix = 8192 * 8192 * 4
    # A few chunks of 8 MiB, and what the allocator keeps of them: it varies from run to run.
    assert peaks["mean"] < matrix / 2, peaks
    assert peaks["none"] < matrix / 2, peaks
    assert peaks["torch"] > matrix, peaks
