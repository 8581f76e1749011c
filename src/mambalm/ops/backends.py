"""Which backend runs an op: the argument, else the context manager, else automatic choice.

A backend is the module ``mambalm.ops.<op>.<name>``. It says in ``supports`` what it cannot do, and that sentence is
what the user reads: in the error when the backend was asked for, in one warning when automatic choice passed it over,
in ``explain`` and ``mambalm doctor`` at any time.
"""

import contextlib
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

NAMES = ("gluon", "triton", "cpu", "portable", "reference")
OPS = ("selective_scan", "ssd", "causal_conv1d", "rms_norm")

# In order of preference. A HIP device is called "cuda" by torch as well. The reference runs only when asked for.
_CANDIDATES = {"cuda": ("gluon", "triton", "portable"), "xpu": ("triton", "portable"), "cpu": ("cpu", "portable")}
_LAST_RESORT = ("portable",)

# One value for the whole process: a plain global is what torch.compile can guard on.
_forced: str | None = None


class BackendError(RuntimeError):
    """A backend that was asked for does not exist or cannot run the call."""


class SlowBackendWarning(UserWarning):
    """Automatic choice passed over a faster backend; the message says why."""


@dataclass(frozen=True)
class Call:
    """What a backend may look at to say whether it can run: no data, so that it works on fake tensors too.

    ``sizes`` holds the axes by the letters of the notation (b, l, d, n, g, h, p, k, and s when packed).
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    sizes: Mapping[str, int] = field(default_factory=dict)


def requested(backend: str | None) -> str:
    """The name asked for by the argument or the enclosing ``use``; "" stands for automatic choice.

    Raises:
        BackendError: there is no backend of that name.
    """
    name = backend if backend is not None else _forced
    if name is not None and name not in NAMES:
        raise BackendError(f"unknown backend {name!r}; the backends are {', '.join(NAMES)}")
    return name or ""


@contextlib.contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Run every op inside the block on ``backend`` (None: automatic choice), in all threads of the process.

    Raises:
        BackendError: the name is unknown; and from an op, when the backend cannot run it.
    """
    global _forced
    requested(backend)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _load(op: str, name: str) -> ModuleType | str:
    """The backend's module, or the reason why there is none."""
    module = f"{__package__}.{op}.{name}"
    if importlib.util.find_spec(module) is None:
        return f"{op} has no {name} backend"
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # of its library's shared objects and set-up, too
        return f"its import failed ({error})"


def _refusal(call: Call, name: str) -> str | None:
    module = _load(call.op, name)
    return module if isinstance(module, str) else module.supports(call)


def _loaded(op: str, name: str) -> ModuleType:
    module = _load(op, name)
    assert isinstance(module, ModuleType)
    return module


def candidates(op: str, device_type: str) -> tuple[str, ...]:
    """The backends of ``op`` that automatic choice tries on a kind of device, best first."""
    names = _CANDIDATES.get(device_type, _LAST_RESORT)
    return tuple(name for name in names if importlib.util.find_spec(f"{__package__}.{op}.{name}") is not None)


_candidates = functools.cache(candidates)


@functools.cache
def _warn(op: str, name: str, chosen: str, reason: str) -> None:
    warnings.warn(
        f"mambalm.{op} runs on its slower {chosen!r} backend, because {name!r} cannot run here: {reason}. "
        "`mambalm doctor` lists every backend.",
        SlowBackendWarning,
        stacklevel=2,
    )


def choose(call: Call, name: str, *, quiet: bool = False) -> ModuleType:
    """The module that runs ``call``: the one named, or the first candidate that supports it ("").

    Raises:
        BackendError: the backend named cannot run the call.
    """
    if name:
        reason = _refusal(call, name)
        if reason is not None:
            raise BackendError(f"{call.op}: the {name!r} backend was asked for but cannot run this call: {reason}")
        return _loaded(call.op, name)
    refused: list[tuple[str, str]] = []
    for candidate in _candidates(call.op, call.device.type):
        reason = _refusal(call, candidate)
        if reason is None:
            if not quiet:
                for other, why in refused:
                    _warn(call.op, other, candidate, why)
            return _loaded(call.op, candidate)
        refused.append((candidate, reason))
    raise BackendError(f"{call.op}: no backend can run this call: " + "; ".join(f"{n}: {w}" for n, w in refused))


def explain(
    op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **sizes: int
) -> dict[str, str | None]:
    """For each backend of ``op``: None if it would run such a call, else the reason why not. Best first.

    Sizes left out are those of a mamba-130m (d=1536, n=16) or mamba2-130m (h=24, p=64, n=128) layer.

    Raises:
        ValueError: there is no such op.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
    usual = {"b": 1, "l": 512, "d": 1536, "n": 128 if op == "ssd" else 16, "g": 1, "h": 24, "p": 64, "k": 4}
    call = Call(op, torch.device(device), dtype, usual | sizes)
    order = _candidates(op, call.device.type)
    return {name: _refusal(call, name) for name in (*order, "reference")}


Function = Callable[..., Any]


class Differentiable(NamedTuple):
    """A computation with its gradient.

    Attributes:
        apply: for tensors as they are.
        transformed: under ``torch.func``, whose grad takes no op of ``torch.library``; slower to call.
    """

    apply: Function
    transformed: Function


def differentiable(run: Function, op: Function, setup_context: Function, backward: Function) -> Differentiable:
    """``run`` with its gradient, without ``torch.library``, which takes the same functions and registered ``op``."""

    # To call a ``setup_context`` torch looks up the signature of the forward, 30 microseconds each time.
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = run(*arguments)
        setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type("Differentiable", (torch.autograd.Function,), methods)
    return Differentiable(function.apply, transformable(run, op, setup_context, backward))


def differentiable_once(name: str, run: Function, op: Function) -> Differentiable:
    """``run`` that computes gradients, which themselves have none: asked for, an error says so."""

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(
            f"{name} has no second derivative: take plain torch where one is needed (backend='reference' of most ops)"
        )

    function = transformable(run, op, lambda ctx, inputs, output: None, refuse)
    return Differentiable(function, function)


def transformable(run: Function, op: Function, setup_context: Function, backward: Function) -> Function:
    """A function that ``torch.func`` can transform; a batch of vmap's is computed call by call."""

    def forward(*arguments: Any) -> Any:
        output = way(run, op, [value for value in arguments if isinstance(value, Tensor)])(*arguments)
        return output if isinstance(output, Tensor) else tuple(output)

    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> Any:
        count = info.batch_size
        calls = [[_row(*pair, at) for pair in zip(arguments, dims, strict=True)] for at in range(max(count, 1))]
        outputs = [made.apply(*call) for call in calls]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs)[:count], 0
        return tuple(torch.stack(rows)[:count] for rows in zip(*outputs, strict=True)), (0,) * len(outputs[0])

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_tangents()

    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "vmap": vmap, "jvp": jvp}
    attributes = {name: staticmethod(method) for name, method in methods.items()}
    made: Any = type("Transformable", (torch.autograd.Function,), attributes)
    return made.apply


def _row(value: Any, dim: Any, at: int) -> Any:
    """What one call of a batch is given of an argument whose axis ``dim`` vmap runs over; of an empty batch, zeros."""
    if not isinstance(dim, int):
        return value
    return value.select(dim, at) if value.shape[dim] else value.new_zeros(value.shape[:dim] + value.shape[dim + 1 :])


def way(
    run: Function, op: Function, tensors: Iterable[Tensor | None], with_gradient: Differentiable | None = None
) -> Function:
    """How to call ``run``: as it is, ``with_gradient`` if one will be asked for, or by its registered ``op``.

    The last is what torch can trace and compile; it costs the host some 60 microseconds, half of what a call takes on a
    GPU and much of a decode step on a CPU.

    Raises:
        NotImplementedError: under forward-mode differentiation, in which a kernel would drop the tangents.
    """
    tensors = tuple(tensors)
    transforms = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
    if forward_ad._current_level >= 0 and not transforms:  # whose functions refuse tangents at their level
        _refuse_tangents(tensors)
    if with_gradient is None:
        return run if is_plain(*tensors) and not needs_grad(*tensors) else op
    if is_plain(*tensors):
        return with_gradient.apply if needs_grad(*tensors) else run
    return with_gradient.transformed if transforms else op


def _refuse_tangents(tensors: tuple[Tensor | None, ...]) -> None:
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise _no_tangents()


def _no_tangents() -> NotImplementedError:
    return NotImplementedError(
        "forward-mode differentiation (torch.func.jvp, jacfwd) is not built: differentiate backwards, or pass "
        "backend='reference', which is plain torch"
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """True when there is data, and nothing traces, compiles or transforms the call."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return all(t is None or (type(t) in _PLAIN_TYPES and not t.is_meta) for t in tensors)


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def needs_grad(*tensors: Tensor | None) -> bool:
    """True when autograd will ask for the gradient of any of the tensors."""
    if not torch.is_grad_enabled():
        return False
    if torch._C._are_functorch_transforms_active():
        return any(t is not None and _is_tracked(t) for t in tensors)
    return any(t is not None and t.requires_grad for t in tensors)


def _is_tracked(tensor: Tensor) -> bool:
    """True when a gradient is asked for at any level of ``torch.func``: vmap hides what its tensors require."""
    if torch.compiler.is_compiling():  # which cannot look below
        return True
    while not tensor.requires_grad:
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Keep autocast out of a backend: it says itself what is rounded."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op computes and keeps states: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
