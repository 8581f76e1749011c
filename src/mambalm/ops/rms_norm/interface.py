"""The public normalisation: checks, dispatch, custom op with fake, autograd."""

import torch
from torch import Tensor

from mambalm.ops import backends, checks
from mambalm.ops.rms_norm import reference

_OP = "rms_norm"


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    gate: Tensor | None = None,
    group_size: int | None = None,
    residual: Tensor | None = None,
    residual_in_fp32: bool = False,
    return_residual: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Divide by the root mean square over the channels (Zhang & Sennrich 2019, arXiv:1910.07467).

    With h = x, h = x silu(gate), or the residual stream h = x + residual::

        y = weight h / sqrt(mean(h²) + eps)

    Args:
        x: (..., d).
        weight: (d); one if None.
        eps: added to the mean square; at least 0.
        gate: (..., d), applied before the normalisation, as Mamba-2 does (arXiv:2405.21060). Excludes a residual.
        group_size: take the mean over each group of that many neighbouring channels; None: over all d.
        residual: the residual stream so far (..., d).
        residual_in_fp32: keep the residual stream in float32 (float64 for a float64 x) instead of residual's dtype.
        return_residual: give the residual stream, where there is one, as well; False: not, and do not write it where no
            gradient needs it.
        backend: one of ``mambalm.ops.backends.NAMES``; None leaves the choice to ``use_backend`` and the library.

    Returns:
        y (..., d) in x's dtype. Given a residual or residual_in_fp32, and return_residual, (y, r) with the new residual
        stream r = x + residual (..., d), which is x where the residual is None; y is made from r as it is kept, after
        rounding. Every tensor has a gradient. Arithmetic is float32, float64 for a float64 x.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit, eps is negative, or gate and residual are both
            given; the message names the argument.
        BackendError: the backend asked for cannot run the call.
    """
    group_size = _check(x, weight, eps, gate, group_size, residual, residual_in_fp32)
    acc = backends.accumulation_dtype(x.dtype)
    stream_dtype = acc if residual_in_fp32 or residual is None else residual.dtype
    name = backends.requested(backend)
    arguments = (x, weight, gate, residual, eps, group_size, stream_dtype)
    if name == "reference":
        y, stream = reference.rms_norm(*arguments)
    else:
        function = backends.way(_run, _forward, (x, weight, gate, residual), _differentiable)
        keep = return_residual or backends.needs_grad(x, weight, residual)
        y, stream = function(*arguments, keep, name)
    if not return_residual:
        return y
    if residual is not None:
        return y, stream
    return (y, x.to(acc)) if residual_in_fp32 else y


def _check(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gate: Tensor | None,
    group_size: int | None,
    residual: Tensor | None,
    residual_in_fp32: bool,
) -> int:
    """The number of channels in a group."""
    checks.tensors(_OP, {"x": x}, {"weight": weight, "gate": gate, "residual": residual})
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{_OP}: x must have shape (..., d) with at least one channel, got {tuple(x.shape)}")
    d = x.shape[-1]
    group_size = d if group_size is None else group_size
    if group_size < 1 or d % group_size:
        raise ValueError(f"{_OP}: the {d} channels of x cannot be split into groups of group_size {group_size}")
    if not eps >= 0:
        raise ValueError(f"{_OP}: eps must be at least 0, got {eps}")
    if gate is not None and (residual is not None or residual_in_fp32):
        raise ValueError(f"{_OP}: gate excludes residual and residual_in_fp32; add the residual before, or norm twice")
    checks.shape(_OP, "weight", weight, (d,), "d")
    checks.shape(_OP, "gate", gate, x.shape, "..., d")
    checks.shape(_OP, "residual", residual, x.shape, "..., d")
    return group_size


def _call(x: Tensor, group_size: int) -> backends.Call:
    d = x.shape[-1]
    return backends.Call(_OP, x.device, x.dtype, {"l": x.numel() // d, "d": d, "g": d // group_size})


def _run(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float,
    group_size: int,
    stream_dtype: torch.dtype,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y and the residual stream, which is empty without a residual or ``keep``."""
    module = backends.choose(_call(x, group_size), backend)
    with backends.exact(x.device):
        return module.forward(x, weight, gate, residual, eps, group_size, stream_dtype, keep)


_forward = torch.library.custom_op("mambalm::rms_norm", _run, mutates_args=())


@_forward.register_fake
def _(x, weight, gate, residual, eps, group_size, stream_dtype, keep, backend):  # type: ignore[no-untyped-def]
    shape = x.shape if residual is not None and keep else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=stream_dtype)


def _run_backward(
    dy: Tensor | None,
    dstream: Tensor | None,
    source: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    group_size: int,
    dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    backend: str,
) -> list[Tensor]:
    """The gradients of source (in ``dtype``), weight and gate, and that of source in ``branch_dtype`` as well; an
    absent one's is an empty tensor."""
    module = backends.choose(_call(source, group_size), backend)
    dy = torch.zeros_like(source) if dy is None else dy
    with backends.exact(source.device):
        gradients = module.backward(dy, dstream, source, weight, gate, eps, group_size, branch_dtype)
    dtypes = (dtype, weight if weight is None else weight.dtype, gate if gate is None else gate.dtype, branch_dtype)
    return [source.new_empty(0) if g is None else g.to(t).contiguous() for g, t in zip(gradients, dtypes, strict=True)]


_backward = torch.library.custom_op("mambalm::rms_norm_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(dy, dstream, source, weight, gate, eps, group_size, dtype, branch_dtype, backend):  # type: ignore[no-untyped-def]
    rest = [source.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, gate)]
    dbranch = source.new_empty(0 if branch_dtype is None else source.shape, dtype=branch_dtype)
    return [source.new_empty(source.shape, dtype=dtype), *rest, dbranch]


_once = backends.differentiable_once(_OP, _run_backward, _backward)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, gate, residual, ctx.eps, ctx.group_size, _, _, ctx.backend = inputs
    ctx.dtypes = (x.dtype, x.dtype if residual is None else residual.dtype)
    ctx.has_residual = residual is not None
    # x and the residual are not kept: their sum, which the next block keeps anyway, says all.
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight, gate)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dstream):  # type: ignore[no-untyped-def]
    source, weight, gate = ctx.saved_tensors
    dx_dtype, dresidual_dtype = ctx.dtypes
    dtype = torch.promote_types(dx_dtype, dresidual_dtype)
    dstream = dstream if ctx.has_residual else None
    given = (dy, dstream, source, weight, gate)
    function = backends.way(_run_backward, _backward, given, _once)
    # In autocast x is of half precision and the stream float32: one pass writes both gradients.
    branch_dtype = None if dx_dtype == dtype else dx_dtype
    dsource, dweight, dgate, dx = function(*given, ctx.eps, ctx.group_size, dtype, branch_dtype, ctx.backend)
    dweight = None if weight is None else dweight
    dgate = None if gate is None else dgate
    dresidual = dsource.to(dresidual_dtype) if ctx.has_residual else None
    return dsource if branch_dtype is None else dx, dweight, dgate, dresidual, *[None] * 5


_forward.register_autograd(_autograd, setup_context=_setup_context)
_differentiable = backends.differentiable(_run, _forward, _setup_context, _autograd)
