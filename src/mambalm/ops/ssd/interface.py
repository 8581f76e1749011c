"""The public ssd: checks, dispatch, custom op with fake, autograd."""

import math

import torch
from torch import Tensor

from mambalm.ops import backends, checks
from mambalm.ops.ssd import reference

_OP = "ssd"


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan of Mamba-2, by state-space duality (Dao & Gu 2024, arXiv:2405.21060, section 6).

    With Δ = dt + dt_bias, through softplus if asked for, then clamped to dt_limit, for each head with its p channels
    and n states::

        h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ        y_t = (h_t C_t + D x_t) silu(z_t)

    Args:
        x: input (b, l, h, p).
        dt: step sizes before bias, softplus and limits (b, l, h).
        A: decay rates, negative (h).
        B: input matrix (b, l, g, n), with g groups of h / g neighbouring heads.
        C: output matrix, of B's shape.
        D: skip weights (h) or (h, p).
        z: gate (b, l, h, p).
        dt_bias: (h).
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: the smallest and the largest Δ; where it is clamped, dt has no gradient.
        initial_state: (b, h, p, n), or (s, h, p, n) with cu_seqlens; zero if None.
        cu_seqlens: int32 offsets (s + 1) of the documents packed into one row (b = 1), from 0 to l. The state starts
            afresh, or from its row of initial_state, at each document. Empty documents are legal.
        return_final_state: return the final state too.
        chunk_size: tokens that are computed as one attention matrix; changes speed and rounding, not the result.
            None leaves it to the backend.
        backend: one of ``mambalm.ops.backends.NAMES``; None leaves the choice to ``use_backend`` and the library.

    Returns:
        y (b, l, h, p) in x's dtype; with return_final_state also the state after the last step, (b, h, p, n) or
        (s, h, p, n), float32 (float64 for a float64 x). Every argument but cu_seqlens has a gradient, the initial
        state included, and gradients flow through the final state. Arithmetic is float32, float64 for a float64 x.

    Raises:
        ValueError, TypeError: a shape, device, dtype or limit does not fit; the message names the argument.
        BackendError: the backend asked for cannot run the call.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    dt_min, dt_max = _limits(dt_limit)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{_OP}: chunk_size must be positive or None, got {chunk_size}")
    name = backends.requested(backend)
    tensors = (x, dt, A, B, C, D, z, dt_bias)
    rest = (dt_softplus, dt_min, dt_max, initial_state, cu_seqlens)
    if name == "reference":
        with backends.exact(x.device):
            y, final_state = reference.ssd(*tensors, *rest)
    else:
        save = backends.needs_grad(*tensors, initial_state)
        function = backends.way(_run, _forward, (*tensors, initial_state, cu_seqlens), _differentiable)
        y, final_state, _ = function(*tensors, *rest, chunk_size, name, return_final_state, save)
    return (y, final_state) if return_final_state else y


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    optional = {"D": D, "z": z, "dt_bias": dt_bias, "initial_state": initial_state}
    checks.tensors(_OP, {"x": x, "dt": dt, "A": A, "B": B, "C": C}, optional)
    checks.dims(_OP, "x", x, 4, "b, l, h, p")
    checks.dims(_OP, "B", B, 4, "b, l, g, n")
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    if g == 0 or h % g:
        raise ValueError(f"{_OP}: the {h} heads of x cannot be split into the {g} groups of B")
    checks.shape(_OP, "dt", dt, (b, l, h), "b, l, h")
    checks.shape(_OP, "A", A, (h,), "h")
    checks.shape(_OP, "B", B, (b, l, g, n), "b, l, g, n")
    checks.shape(_OP, "C", C, (b, l, g, n), "b, l, g, n")
    if D is not None and D.shape not in ((h,), (h, p)):
        raise ValueError(f"{_OP}: D must have shape (h) = {(h,)} or (h, p) = {(h, p)}, got {tuple(D.shape)}")
    checks.shape(_OP, "z", z, (b, l, h, p), "b, l, h, p")
    checks.shape(_OP, "dt_bias", dt_bias, (h,), "h")
    checks.offsets(_OP, cu_seqlens, x)
    rows, letter = (b, "b") if cu_seqlens is None else (cu_seqlens.shape[0] - 1, "s")
    checks.shape(_OP, "initial_state", initial_state, (rows, h, p, n), f"{letter}, h, p, n")


def _limits(dt_limit: tuple[float, float]) -> tuple[float, float]:
    dt_min, dt_max = (float(limit) for limit in dt_limit)
    if not 0 <= dt_min <= dt_max:
        raise ValueError(f"{_OP}: dt_limit must be (smallest, largest) with 0 <= smallest <= largest, got {dt_limit}")
    return dt_min, dt_max


def _call(x: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> backends.Call:
    sizes = dict(zip("blhp", x.shape, strict=True)) | {"g": B.shape[2], "n": B.shape[3]}
    if cu_seqlens is not None:
        sizes["s"] = cu_seqlens.shape[0] - 1
    return backends.Call(_OP, x.device, x.dtype, sizes)


def _run(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    backend: str,
    final: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and what the backend's backward wants to find again; empty unless ``final``, ``save``."""
    module = backends.choose(_call(x, B, cu_seqlens), backend)
    inputs = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, cu_seqlens, chunk_size)
    with backends.exact(x.device):
        return module.forward(*inputs, final=final, save=save)


_forward = torch.library.custom_op("mambalm::ssd", _run, mutates_args=())


@_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    dt_softplus,
    dt_min,
    dt_max,
    initial_state,
    cu_seqlens,
    chunk_size,
    backend,
    final,
    save,
):
    call = _call(x, B, cu_seqlens)
    acc = backends.accumulation_dtype(x.dtype)
    kept = backends.choose(call, backend, quiet=True).checkpoint_shape(call) if save else (0,)
    rows = call.sizes.get("s", call.sizes["b"])
    return (
        x.new_empty(x.shape),
        x.new_empty((rows, *x.shape[2:], B.shape[3]) if final else (0,), dtype=acc),
        x.new_empty(kept, dtype=acc),
    )


def _run_backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    checkpoints: Tensor,
    backend: str,
) -> list[Tensor]:
    """The gradients of x, dt, A, B, C, D, z, dt_bias and initial_state; an absent one's is an empty tensor."""
    module = backends.choose(_call(x, B, cu_seqlens), backend)
    inputs = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, cu_seqlens, chunk_size)
    dy = torch.zeros_like(x) if dy is None else dy
    with backends.exact(x.device):
        gradients = module.backward(dy, dfinal_state, *inputs, checkpoints)
    wanted = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return [x.new_empty(0) if t is None else g.to(t.dtype) for t, g in zip(wanted, gradients, strict=True)]


_backward = torch.library.custom_op("mambalm::ssd_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, cu_seqlens, *_
):
    wanted = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in wanted]


_once = backends.differentiable_once(_OP, _run_backward, _backward)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, softplus, low, high, initial_state, cu_seqlens, chunk_size, backend, final, _ = inputs
    ctx.steps, ctx.chunk_size, ctx.backend, ctx.final = (softplus, low, high), chunk_size, backend, final
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_state, _):  # type: ignore[no-untyped-def]
    *tensors, initial_state, cu_seqlens, checkpoints = ctx.saved_tensors
    given = (dy, dfinal_state if ctx.final else None, *tensors)
    rest = (*ctx.steps, initial_state, cu_seqlens, ctx.chunk_size, checkpoints, ctx.backend)
    function = backends.way(_run_backward, _backward, (*given, initial_state, cu_seqlens, checkpoints), _once)
    gradients = function(*given, *rest)
    present = (*(t is not None for t in tensors), initial_state is not None)
    *gradients, dinitial = [g if there else None for g, there in zip(gradients, present, strict=True)]
    return (*gradients, None, None, None, dinitial, *[None] * 5)


_forward.register_autograd(_autograd, setup_context=_setup_context)
_differentiable = backends.differentiable(_run, _forward, _setup_context, _autograd)
