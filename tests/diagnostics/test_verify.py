"""`verify` passes what is right, and fails what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mambalm.diagnostics.forms import FORMS, Form, Model, Reading, one_pass, packed, padded, random_chunks
from mambalm.diagnostics.tiny import tiny_models
from mambalm.diagnostics.verify import QUANTITIES, Check, relative_error, verify
from mambalm.layers.state import State

FAMILIES = ["Mamba", "FalconMamba", "Mamba-2", "Mamba-2 with attention", "Transformer++"]


@pytest.fixture(scope="module")
def families() -> dict[str, PreTrainedModel]:
    return tiny_models()


def run(model: PreTrainedModel, *forms: str) -> list[Check]:
    return verify(model, lengths=(11, 1, 6), forms={name: FORMS[name] for name in forms or FORMS})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_every_family(families: dict[str, PreTrainedModel], family: str) -> None:
    checks = run(families[family])
    assert {(check.form, check.quantity) for check in checks} == {(form, what) for form in FORMS for what in QUANTITIES}
    assert not [check for check in checks if not check.passed]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny_models(dtype)["Mamba-2"]
    checks = run(model, "token by token", "packed")
    assert not [check for check in checks if not check.passed]
    assert all((check.allowed > 1e-4) == (dtype == torch.bfloat16) for check in checks)


def test_the_model_is_left_alone(families: dict[str, PreTrainedModel]) -> None:
    model = families["Mamba"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model, "one pass")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def drops_the_state(model: Model, documents: Sequence[Tensor], initial: State) -> Reading:
    return one_pass(model, documents, initial._map(lambda tensor, _: torch.zeros_like(tensor)))


def leaks_between_documents(model: Model, documents: Sequence[Tensor], initial: State) -> Reading:
    whole = one_pass(model, [torch.cat(list(documents))], initial.index(0))
    logits = whole.logits[0].split([len(document) for document in documents])
    return Reading(logits, State.cat([whole.state] * len(documents)))


def cuts_the_gradient(model: Model, documents: Sequence[Tensor], initial: State) -> Reading:
    return one_pass(model, documents, initial.detach())


def returns_not_a_number(model: Model, documents: Sequence[Tensor], initial: State) -> Reading:
    reading = one_pass(model, documents, initial)
    return replace(reading, logits=tuple(logits * torch.nan for logits in reading.logits))


@pytest.mark.parametrize(
    ("form", "wrong"),
    [
        (drops_the_state, {"logits", "state", "gradients"}),
        (leaks_between_documents, {"logits", "state", "gradients"}),
        (cuts_the_gradient, {"gradients"}),
        (returns_not_a_number, {"logits", "gradients"}),
    ],
)
def test_a_wrong_form_fails(families: dict[str, PreTrainedModel], form: Form, wrong: set[str]) -> None:
    checks = verify(families["Mamba"], lengths=(11, 1, 6), forms={"wrong": form})
    assert {check.quantity for check in checks if not check.passed} == wrong


def test_without_gradients_none_are_compared(families: dict[str, PreTrainedModel]) -> None:
    checks = verify(families["Mamba"], lengths=(3,), gradients=False)
    assert {check.quantity for check in checks} == {"logits", "state"}


def test_random_chunks_are_many_and_short_ones_among_them(families: dict[str, PreTrainedModel]) -> None:
    calls: list[int] = []
    model = families["Mamba"]

    def counting(ids: Tensor, **options: object) -> object:
        calls.append(ids.shape[1])
        return model(ids, **options)

    with torch.no_grad():
        random_chunks(counting, [torch.arange(60)], model.init_state(1))
        assert sum(calls) == 60
        assert len(calls) >= 4
        assert min(calls) < 3
        calls.clear()
        packed(counting, [torch.arange(9), torch.arange(4)], model.init_state(2))
        padded(counting, [torch.arange(9), torch.arange(4)], model.init_state(2), side="left")
    assert calls == [13, 9]


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == pytest.approx(5.0)
