"""The equalities, measured on a model: every form against one pass through the reference in float64.

Allowed is a relative error of 1e-5 in float32, and in half precision twice the error of the reference itself run in
that dtype. The error of several tensors is the root mean square of their relative errors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from mambalm import ops
from mambalm.diagnostics.forms import FORMS, Form, Model, one_pass, state_tensors
from mambalm.layers.state import State

if TYPE_CHECKING:
    from mambalm.models.common import MambalmForCausalLM

FLOAT32_TOLERANCE = 1e-5
HALF_PRECISION_FACTOR = 2.0
HALF = (torch.bfloat16, torch.float16)
QUANTITIES = ("logits", "state", "gradients")

# By quantity, then by the tensor's name.
Measured = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Check:
    """One quantity of one form.

    Attributes:
        form: the name of the form.
        quantity: "logits", "state" or "gradients".
        error: the root mean square of the relative errors of the quantity's tensors.
        allowed: what it may be at most.
        worst: the name of the tensor with the largest error.
    """

    form: str
    quantity: str
    error: float
    allowed: float
    worst: str

    @property
    def passed(self) -> bool:
        """False for an error that is not a number."""
        return self.error <= self.allowed


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| of two tensors of one shape, in float64; the plain norm of the difference
    where the latter is 0.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} have no difference")
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    scale = expected.norm().item()
    error = (actual - expected).norm().item()
    return error / scale if scale else error


def verify(
    model: MambalmForCausalLM,
    *,
    lengths: Sequence[int] = (80, 1, 20),
    seed: int = 0,
    gradients: bool = True,
    forms: Mapping[str, Form] = FORMS,
) -> list[Check]:
    """Run the equalities on a model with random tokens; a check per form and quantity.

    The documents follow a few tokens that were read before, so that initial states and their gradients take part.
    A float64 copy of the model is made; with `gradients`, those of both are held as well.

    Args:
        model: a causal language model of mambalm; its gradients are left alone.
        lengths: the number of tokens of each document.
        seed: of the tokens and of the loss.
        gradients: whether to compare those of all parameters and of the initial state.
        forms: what to run, by name.
    """
    documents, prefixes = _random_documents(model, lengths, seed)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        initial = one_pass(model, prefixes, model.init_state(len(prefixes))).state
    with ops.use_backend("reference"):
        truth = measure(one_pass, exact, documents, pytree.tree_map(_doubled, initial), seed, gradients)
        half = model.dtype in HALF
        rounded = measure(one_pass, model, documents, initial, seed, gradients) if half else None
    checks: list[Check] = []
    for name, form in forms.items():
        measured = measure(form, model, documents, initial, seed, gradients)
        checks += _compare(name, measured, truth, rounded)
    return checks


def measure(
    form: Form,
    model: MambalmForCausalLM,
    documents: Sequence[Tensor],
    initial: State,
    seed: int = 0,
    gradients: bool = True,
) -> Measured:
    """Logits, state and gradients that a form gives, by quantity and name.

    The gradients are those of a random linear function of logits and state, for all parameters and `initial`.
    """
    tensors, structure = pytree.tree_flatten(initial)
    tensors = [t.detach().clone().requires_grad_(gradients and t.is_floating_point()) for t in tensors]
    parameters = _masters(model) if gradients else {}
    with torch.set_grad_enabled(gradients):
        reading = form(_calling(model, parameters), documents, pytree.tree_unflatten(tensors, structure))
        logits = {f"document {i}": rows for i, rows in enumerate(reading.logits)}
        state = state_tensors(reading.state)
        measured: dict[str, Mapping[str, Tensor]] = {"logits": _detached(logits), "state": _detached(state)}
        if gradients:
            sources = parameters | {f"initial state {i}": t for i, t in enumerate(tensors) if t.requires_grad}
            loss = _random_sum([*logits.values(), *state.values()], seed)
            found = torch.autograd.grad(loss, list(sources.values()), materialize_grads=True)
            measured["gradients"] = dict(zip(sources, found, strict=True))
    return measured


def _masters(model: MambalmForCausalLM) -> dict[str, Tensor]:
    """The parameters that get gradients, those in half precision in float32."""
    return {
        name: p.detach().to(torch.float32 if p.dtype in HALF else p.dtype, copy=True).requires_grad_()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _calling(model: MambalmForCausalLM, masters: Mapping[str, Tensor]) -> Model:
    """The model as a function of `masters`.

    Each call rounds them anew to the model's dtypes, so that the gradients of many calls are summed in float32: the
    rounding of a sum in half precision is no error of a form.
    """
    dtypes = {name: p.dtype for name, p in model.named_parameters()}

    def call(*arguments: Any, **options: Any) -> Any:
        parameters = {name: tensor.to(dtypes[name]) for name, tensor in masters.items()}
        return functional_call(model, parameters, arguments, options)

    return call


def _random_documents(
    model: MambalmForCausalLM, lengths: Sequence[int], seed: int, prefix: int = 5
) -> tuple[list[Tensor], list[Tensor]]:
    """Documents of these lengths, and a prefix for each."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        return torch.randint(model.config.vocab_size, (length,), generator=generator).to(model.device)

    return [tokens(length) for length in lengths], [tokens(prefix) for _ in lengths]


def _random_sum(tensors: Iterable[Tensor], seed: int) -> Tensor:
    """The sum of all elements, each times a normal random number of its own, in float64."""
    generator = torch.Generator().manual_seed(seed)
    terms = [
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)).sum()
        for t in tensors
    ]
    return torch.stack(terms).sum()


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _compare(form: str, measured: Measured, truth: Measured, rounded: Measured | None) -> Iterable[Check]:
    for quantity, tensors in measured.items():
        errors = _errors(tensors, truth[quantity])
        allowed = FLOAT32_TOLERANCE
        if rounded is not None:
            reference = _root_mean_square(_errors(rounded[quantity], truth[quantity]).values())
            allowed = max(allowed, HALF_PRECISION_FACTOR * reference)
        worst = max(errors, key=lambda name: errors[name])
        yield Check(form, quantity, _root_mean_square(errors.values()), allowed, worst)


def _errors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(actual[name], tensor) for name, tensor in expected.items()}


def _root_mean_square(values: Iterable[float]) -> float:
    squares = [value * value for value in values]
    return math.sqrt(sum(squares) / len(squares))
