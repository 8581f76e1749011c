"""One pass = any split = token by token = packed: outputs, final states and gradients, the states' own included."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from mambalm.layers import AttentionState, Mamba
from tests.helpers import assert_close, assert_no_worse, cu_seqlens, relative_error
from tests.layers.cases import (
    D_MODEL,
    LAYERS,
    build,
    contents,
    exact,
    outcome,
    past,
    read_packed,
    read_pieces,
    read_whole,
    same_weights,
)

FORMS = {
    "whole": read_whole,
    "split": read_pieces(1, 0, 4, 6),
    "tokens": read_pieces(*[1] * 11),
    "packed": read_packed,
}

every_layer = pytest.mark.parametrize("name", LAYERS)
from_past = pytest.mark.parametrize("continued", [False, True], ids=["fresh", "continued"])


@every_layer
@from_past
def test_float32(name: str, continued: bool) -> None:
    layer = build(name)
    x = torch.randn(3, 11, D_MODEL)
    state = past(layer) if continued else None
    truth = exact(layer, x, state)
    for form, read in FORMS.items():
        found = outcome(layer, x, state, read)
        try:
            assert_close(found, truth)
        except AssertionError as error:
            error.add_note(form)
            raise


@every_layer
def test_bfloat16(name: str) -> None:
    """Gradients that add up over the pieces (of parameters, of keys and values) only where one backward sums them.

    Autograd adds the pieces' shares in bfloat16, and rounds each time.
    """
    layer = build(name).bfloat16()
    x = torch.randn(3, 11, D_MODEL).bfloat16()
    state = past(layer.float()).to(dtype=torch.bfloat16)
    layer = layer.bfloat16()
    truth = exact(layer, x, state)
    specification = same_weights(layer, name, backend="reference").bfloat16()
    rounded = outcome(specification, x, state, read_whole)
    summed = {f"d {parameter}" for parameter, _ in layer.named_parameters()}
    if isinstance(state, AttentionState):
        summed = {key for key in truth if key.startswith("d ")}
    for form, read in FORMS.items():
        wanted = truth.keys() if form in ("whole", "packed") else truth.keys() - summed
        found = outcome(layer, x, state, read)
        assert found["y"].dtype == (torch.float32 if name == "block-mlp" else torch.bfloat16)
        assert_no_worse(found, rounded, {key: truth[key] for key in wanted})


@every_layer
@given(cuts=st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_random_splits(name: str, cuts: list[int]) -> None:
    torch.manual_seed(0)
    layer = build(name)
    edges = sorted({0, *cuts})
    x = torch.randn(2, edges[-1], D_MODEL)
    with torch.no_grad():
        whole, final = read_whole(layer, x, None)
        pieces, same = read_pieces(*(b - a for a, b in itertools.pairwise([0, *edges])))(layer, x, None)
    assert_close({"y": pieces} | contents(same), {"y": whole} | contents(final))


@every_layer
def test_documents_of_different_lengths(name: str) -> None:
    """Packed, each from its own state, empty ones too, as each alone."""
    layer = build(name)
    state = past(layer)
    edges = [0, 4, 4, 13]
    x = torch.randn(1, 13, D_MODEL)
    y, final = layer(x, state, cu_seqlens(edges), return_state=True)
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        alone, last = layer(x[:, start:end], state[i], return_state=True)
        assert_close({"y": y[:, start:end]} | contents(final[i]), {"y": alone} | contents(last))


@every_layer
def test_nothing_to_read(name: str) -> None:
    layer = build(name)
    state = past(layer)
    for empty in (torch.zeros(3, 0, D_MODEL), torch.zeros(1, 0, D_MODEL)):
        offsets = None if len(empty) == 3 else cu_seqlens([0, 0, 0, 0])
        y, same = layer(empty, state, offsets, return_state=True)
        assert y.shape == empty.shape
        assert_close(contents(same), contents(state), 0)
    y, none = layer(torch.zeros(1, 0, D_MODEL), None, cu_seqlens([0]), return_state=True)
    assert y.shape == (1, 0, D_MODEL)
    assert none.batch_size == 0


@every_layer
def test_inputs_are_left_alone(name: str) -> None:
    layer = build(name)
    state, x = past(layer), torch.randn(3, 5, D_MODEL)
    before = copy.deepcopy((state, x))
    layer(x, state, return_state=True)[0].sum().backward()
    for leaf, kept in zip(pytree.tree_leaves((state, x)), pytree.tree_leaves(before), strict=True):
        assert leaf is kept is None or torch.equal(leaf, kept)


@every_layer
def test_zero_state_is_no_state(name: str) -> None:
    layer = build(name)
    x = torch.randn(2, 6, D_MODEL)
    zero = layer.init_state(2)
    assert zero.batch_size == 2
    assert_close({"y": layer(x, zero)}, {"y": layer(x)}, 1e-6)


@every_layer
def test_without_the_state(name: str) -> None:
    layer = build(name)
    x = torch.randn(2, 6, D_MODEL)
    assert torch.equal(layer(x), layer(x, return_state=True)[0])


def test_the_state_matters() -> None:
    """The equalities would hold of a layer that forgets everything."""
    layer = build("mamba")
    x = torch.randn(3, 6, D_MODEL)
    assert relative_error(layer(x, past(layer)), layer(x)) > 1e-2


def test_float64_states() -> None:
    layer = Mamba(D_MODEL).double()
    assert layer(torch.randn(1, 3, D_MODEL).double(), return_state=True)[1].ssm.dtype == torch.float64
