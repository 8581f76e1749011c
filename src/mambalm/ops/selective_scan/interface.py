"""The public selective scan: checks, dispatch, custom op with fake, autograd."""

import torch
from torch import Tensor

from mambalm.ops import backends, checks
from mambalm.ops.selective_scan import reference

_OP = "selective_scan"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba-1 (Gu & Dao 2023, arXiv:2312.00752, section 3).

    With Δ = delta + delta_bias, through softplus if asked for, for each channel and each of its n states::

        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = (C_t h_t + D u_t) silu(z_t)

    Args:
        u: input (b, l, d).
        delta: step sizes before bias and softplus (b, l, d).
        A: decay rates, negative (d, n).
        B: input matrix (b, l, n), or (b, l, g, n) with g groups of d / g neighbouring channels.
        C: output matrix, of B's shape.
        D: skip weights (d).
        z: gate (b, l, d).
        delta_bias: (d).
        delta_softplus: apply softplus to delta + delta_bias.
        initial_state: (b, d, n), or (s, d, n) with cu_seqlens; zero if None.
        cu_seqlens: int32 offsets (s + 1) of the documents packed into one row (b = 1), from 0 to l. The state starts
            afresh, or from its row of initial_state, at each document. Empty documents are legal.
        return_final_state: return the final state too.
        backend: one of ``mambalm.ops.backends.NAMES``; None leaves the choice to ``use_backend`` and the library.

    Returns:
        y (b, l, d) in u's dtype; with return_final_state also the state after the last step, (b, d, n) or (s, d, n),
        float32 (float64 for a float64 u). Every argument but cu_seqlens has a gradient, the initial state included,
        and gradients flow through the final state. Arithmetic is float32, float64 for a float64 u.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit; the message names the tensor.
        BackendError: the backend asked for cannot run the call.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    if B.ndim == 3:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    name = backends.requested(backend)
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    if name == "reference":
        y, final_state = reference.selective_scan(*tensors, delta_softplus, initial_state, cu_seqlens)
    else:
        save = backends.needs_grad(*tensors, initial_state)
        function = backends.way(_run, _forward, (*tensors, initial_state, cu_seqlens), _differentiable)
        y, final_state, _ = function(*tensors, delta_softplus, initial_state, cu_seqlens, name, save)
    return (y, final_state) if return_final_state else y


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    optional = {"D": D, "z": z, "delta_bias": delta_bias, "initial_state": initial_state}
    checks.tensors(_OP, {"u": u, "delta": delta, "A": A, "B": B, "C": C}, optional)
    checks.dims(_OP, "u", u, 3, "b, l, d")
    checks.dims(_OP, "A", A, 2, "d, n")
    b, l, d = u.shape
    n = A.shape[1]
    if B.ndim not in (3, 4):
        raise ValueError(f"{_OP}: B must have shape (b, l, n) or (b, l, g, n), got {tuple(B.shape)}")
    groups = (B.shape[2],) if B.ndim == 4 else ()
    if groups and (groups[0] == 0 or d % groups[0]):
        raise ValueError(f"{_OP}: the {d} channels of u cannot be split into the {groups[0]} groups of B")
    checks.shape(_OP, "delta", delta, (b, l, d), "b, l, d")
    checks.shape(_OP, "A", A, (d, n), "d, n")
    checks.shape(_OP, "B", B, (b, l, *groups, n), "b, l, g, n" if groups else "b, l, n")
    checks.shape(_OP, "C", C, (b, l, *groups, n), "b, l, g, n" if groups else "b, l, n")
    checks.shape(_OP, "D", D, (d,), "d")
    checks.shape(_OP, "z", z, (b, l, d), "b, l, d")
    checks.shape(_OP, "delta_bias", delta_bias, (d,), "d")
    checks.offsets(_OP, cu_seqlens, u)
    rows, letter = (b, "b") if cu_seqlens is None else (cu_seqlens.shape[0] - 1, "s")
    checks.shape(_OP, "initial_state", initial_state, (rows, d, n), f"{letter}, d, n")


def _call(u: Tensor, A: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> backends.Call:
    sizes = {"b": u.shape[0], "l": u.shape[1], "d": u.shape[2], "n": A.shape[1], "g": B.shape[2]}
    if cu_seqlens is not None:
        sizes["s"] = cu_seqlens.shape[0] - 1
    return backends.Call(_OP, u.device, u.dtype, sizes)


def _run(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states that the backend's backward wants to find again (empty unless ``save``)."""
    module = backends.choose(_call(u, A, B, cu_seqlens), backend)
    with backends.exact(u.device):
        return module.forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save=save)


_forward = torch.library.custom_op("mambalm::selective_scan", _run, mutates_args=())


@_forward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, backend, save):  # type: ignore[no-untyped-def]
    call = _call(u, A, B, cu_seqlens)
    acc = backends.accumulation_dtype(u.dtype)
    kept = backends.choose(call, backend, quiet=True).checkpoint_shape(call) if save else (0,)
    rows = call.sizes.get("s", call.sizes["b"])
    return (
        u.new_empty(u.shape),
        u.new_empty((rows, *A.shape), dtype=acc),
        u.new_empty(kept, dtype=acc),
    )


def _run_backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    backend: str,
) -> list[Tensor]:
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state; an absent one's is an empty tensor."""
    module = backends.choose(_call(u, A, B, cu_seqlens), backend)
    inputs = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)
    dy = torch.zeros_like(u) if dy is None else dy
    with backends.exact(u.device):
        gradients = module.backward(dy, dfinal_state, *inputs, checkpoints)
    wanted = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [u.new_empty(0) if t is None else g.to(t.dtype) for t, g in zip(wanted, gradients, strict=True)]


_backward = torch.library.custom_op("mambalm::selective_scan_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy,
    dfinal_state,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    initial_state,
    cu_seqlens,
    checkpoints,
    backend,
):
    wanted = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [u.new_empty(0) if t is None else t.new_empty(t.shape) for t in wanted]


_once = backends.differentiable_once(_OP, _run_backward, _backward)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.delta_softplus, initial_state, cu_seqlens, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_state, _):  # type: ignore[no-untyped-def]
    *tensors, initial_state, cu_seqlens, checkpoints = ctx.saved_tensors
    given, rest = (dy, dfinal_state, *tensors), (initial_state, cu_seqlens, checkpoints)
    function = backends.way(_run_backward, _backward, (*given, *rest), _once)
    gradients = function(*given, ctx.delta_softplus, *rest, ctx.backend)
    present = (*(t is not None for t in tensors), initial_state is not None)
    *gradients, dinitial = [g if there else None for g, there in zip(gradients, present, strict=True)]
    return (*gradients, None, dinitial, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)
_differentiable = backends.differentiable(_run, _forward, _setup_context, _autograd)
