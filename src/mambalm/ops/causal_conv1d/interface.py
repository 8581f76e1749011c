"""The public causal convolution: checks, dispatch, custom op with fake, autograd."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalm.ops import backends, checks
from mambalm.ops.causal_conv1d import reference

_OP = "causal_conv1d"


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    sizes: Sequence[int] | None = None,
    backend: str | None = None,
) -> Any:
    """A depthwise causal convolution: each channel with its own filter, over the inputs up to now.

    With x_{-1}, x_{-2}, ... taken from the initial state::

        y_t = activation(bias + Σ_j weight_j x_{t-(k-1)+j}),   j = 0 .. k-1

    Args:
        x: input (b, l, d).
        weight: filters, the current input's weight last (d, k), as ``nn.Conv1d`` keeps them in (d, 1, k).
        bias: (d).
        activation: None, or "silu" (also called "swish").
        initial_state: the last k-1 inputs, oldest first, (b, d, k-1), or (s, d, k-1) with cu_seqlens; zero if None.
        cu_seqlens: int32 offsets (s + 1) of the documents packed into one row (b = 1), from 0 to l. No document sees
            inputs of another. Empty documents are legal.
        return_final_state: return the final state too.
        sizes: of parts, d channels in all, into which y is cut: their gradients are read where they lie then, if the
            backend can, instead of being joined first.
        backend: one of ``mambalm.ops.backends.NAMES``; None leaves the choice to ``use_backend`` and the library.

    Returns:
        y (b, l, d) in x's dtype, or with ``sizes`` a tuple of parts of it (b, l, size); with return_final_state also
        the last k-1 inputs, (b, d, k-1) or (s, d, k-1), in x's dtype; after fewer inputs than that, they begin with the
        newest of the initial state. Every argument but cu_seqlens has a gradient, and gradients flow through the final
        state. Arithmetic is float32, float64 for a float64 x.

    Raises:
        ValueError, TypeError: a shape, device, dtype or activation does not fit; the message names it.
        BackendError: the backend asked for cannot run the call.
    """
    _check(x, weight, bias, activation, initial_state, cu_seqlens)
    if sizes is not None and sum(sizes) != x.shape[-1]:
        raise ValueError(f"{_OP}: sizes must add up to the {x.shape[-1]} channels of x, got {list(sizes)}")
    silu = activation is not None
    name = backends.requested(backend)
    if name == "reference":
        y, final_state = reference.causal_conv1d(x, weight, bias, silu, initial_state, cu_seqlens)
    else:
        function = backends.way(_run, _forward, (x, weight, bias, initial_state, cu_seqlens), _differentiable)
        plain = function is _differentiable.apply
        if sizes is not None and plain and hasattr(_backend(x, weight, cu_seqlens, name), "PARTS"):
            *parts, final_state = _Parts.apply(x, weight, bias, silu, initial_state, cu_seqlens, name, list(sizes))
            return (tuple(parts), final_state) if return_final_state else tuple(parts)
        y, final_state = function(x, weight, bias, silu, initial_state, cu_seqlens, name)
    if sizes is not None:
        y = y.split(list(sizes), dim=-1)
    return (y, final_state) if return_final_state else y


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    checks.tensors(_OP, {"x": x, "weight": weight}, {"bias": bias, "initial_state": initial_state})
    checks.dims(_OP, "x", x, 3, "b, l, d")
    checks.dims(_OP, "weight", weight, 2, "d, k")
    b, _, d = x.shape
    k = weight.shape[1]
    if k == 0:
        raise ValueError(f"{_OP}: weight must have at least one tap, got shape {tuple(weight.shape)}")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{_OP}: activation must be None, 'silu' or 'swish', got {activation!r}")
    checks.shape(_OP, "weight", weight, (d, k), "d, k")
    checks.shape(_OP, "bias", bias, (d,), "d")
    checks.offsets(_OP, cu_seqlens, x)
    rows, letter = (b, "b") if cu_seqlens is None else (cu_seqlens.shape[0] - 1, "s")
    checks.shape(_OP, "initial_state", initial_state, (rows, d, k - 1), f"{letter}, d, k-1")


def _call(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> backends.Call:
    sizes = {"b": x.shape[0], "l": x.shape[1], "d": x.shape[2], "k": weight.shape[1]}
    if cu_seqlens is not None:
        sizes["s"] = cu_seqlens.shape[0] - 1
    return backends.Call(_OP, x.device, x.dtype, sizes)


def _backend(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, name: str) -> ModuleType:
    return backends.choose(_call(x, weight, cu_seqlens), name)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    module = _backend(x, weight, cu_seqlens, backend)
    with backends.exact(x.device):
        return module.forward(x, weight, bias, silu, initial_state, cu_seqlens)


_forward = torch.library.custom_op("mambalm::causal_conv1d", _run, mutates_args=())


@_forward.register_fake
def _(x, weight, bias, silu, initial_state, cu_seqlens, backend):  # type: ignore[no-untyped-def]
    (b, _, d), k = x.shape, weight.shape[1]
    rows = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(rows, d, k - 1)


def _run_backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> list[Tensor]:
    """The gradients of x, weight, bias and initial_state; an absent one's is an empty tensor."""
    dy = torch.zeros_like(x) if dy is None else dy
    return _gradients(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens, backend)


def _gradients(dy: Tensor | list[Tensor], dfinal_state: Tensor | None, *arguments: Any) -> list[Tensor]:
    """As `_run_backward`, with dy in parts where the backend has PARTS."""
    x, weight, bias, _, initial_state, cu_seqlens, backend = arguments
    with backends.exact(x.device):
        gradients = _backend(x, weight, cu_seqlens, backend).backward(dy, dfinal_state, *arguments[:-1])
    wanted = (x, weight, bias, initial_state)
    return [x.new_empty(0) if t is None else g.to(t.dtype).contiguous() for t, g in zip(wanted, gradients, strict=True)]


_backward = torch.library.custom_op("mambalm::causal_conv1d_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens, backend):  # type: ignore[no-untyped-def]
    return [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, initial_state)]


_once = backends.differentiable_once(_OP, _run_backward, _backward)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.silu, initial_state, cu_seqlens, ctx.backend = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_state):  # type: ignore[no-untyped-def]
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    given, rest = (dy, dfinal_state, x, weight, bias), (initial_state, cu_seqlens)
    function = backends.way(_run_backward, _backward, (*given, *rest), _once)
    dx, dweight, dbias, dinitial = function(*given, ctx.silu, *rest, ctx.backend)
    dbias = None if bias is None else dbias
    dinitial = None if initial_state is None else dinitial
    return dx, dweight, dbias, None, dinitial, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
_differentiable = backends.differentiable(_run, _forward, _setup_context, _autograd)


class _Parts(torch.autograd.Function):
    """y in parts, and the final state."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *arguments, ctx.sizes = inputs
        y, final_state = _run(*arguments)
        _setup_context(ctx, arguments, None)
        return (*y.split(ctx.sizes, dim=-1), final_state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
        *parts, dfinal_state = gradients
        dy = [
            x.new_zeros(1).expand(*x.shape[:2], size) if g is None else g
            for g, size in zip(parts, ctx.sizes, strict=True)
        ]
        arguments = (x, weight, bias, ctx.silu, initial_state, cu_seqlens, ctx.backend)
        dx, dweight, dbias, dinitial = _gradients(dy, dfinal_state, *arguments)
        there = (None if bias is None else dbias, None if initial_state is None else dinitial)
        return dx, dweight, there[0], None, there[1], None, None, None
