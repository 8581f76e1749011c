"""States are values: moved, cut, copied, indexed, joined, never changed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from mambalm.layers import AttentionState, Mamba, MambaState, State


def mamba_state(b: int = 3) -> MambaState:
    return MambaState(torch.randn(b, 8, 3), torch.randn(b, 8, 4))


def attention_state(lengths: tuple[int, ...] = (2, 5, 0)) -> AttentionState:
    b, m = len(lengths), max(lengths)
    return AttentionState(torch.randn(b, m, 2, 4), torch.randn(b, m, 2, 4), torch.tensor(lengths), torch.randn(b, 6, 2))


def model_state(b: int = 3) -> State:
    return State((mamba_state(b), attention_state((2, 5, 0)[:b])), torch.arange(b))


def tensors(state: State | MambaState | AttentionState) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if leaf is not None]


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        mamba_state().conv = torch.zeros(1)  # type: ignore[misc]


def test_to_changes_activations_only() -> None:
    state = model_state().to(dtype=torch.bfloat16)
    mamba, attention = state.layers
    assert isinstance(mamba, MambaState)
    assert isinstance(attention, AttentionState)
    assert attention.conv is not None
    assert mamba.conv.dtype == attention.keys.dtype == attention.values.dtype == attention.conv.dtype == torch.bfloat16
    assert mamba.ssm.dtype == torch.float32
    assert attention.lengths.dtype == state.position.dtype == torch.int64
    assert all(leaf.is_meta for leaf in tensors(state.to("meta")))
    assert state.to("meta").layers[0].conv.dtype == torch.bfloat16


def test_detach_and_clone() -> None:
    conv = torch.randn(3, 8, 3, requires_grad=True)
    state = MambaState(conv, torch.randn(3, 8, 4))
    copied = state.clone()
    assert copied.conv.requires_grad
    assert copied.conv.data_ptr() != conv.data_ptr()
    assert torch.equal(copied.conv, conv)
    cut = state.detach()
    assert not cut.conv.requires_grad
    assert cut.conv.data_ptr() == conv.data_ptr()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, [1]),
        (-1, [2]),
        (torch.tensor(1), [1]),
        (slice(1, None), [1, 2]),
        ([2, 0, 0], [2, 0, 0]),
        (torch.tensor([1, 1]), [1, 1]),
        (torch.tensor([2], dtype=torch.int32), [2]),
        (torch.tensor([True, False, True]), [0, 2]),
        ([], []),
    ],
    ids=str,
)
def test_index(rows: object, expected: list[int]) -> None:
    state = model_state()
    chosen = state[rows]  # type: ignore[index]
    assert chosen.batch_size == len(expected)
    assert chosen.position.tolist() == expected
    for leaf, whole in zip(tensors(chosen), tensors(state), strict=True):
        assert torch.equal(leaf, whole[expected])


def test_index_outside() -> None:
    with pytest.raises(IndexError):
        model_state()[3]


def test_reorder() -> None:
    state = model_state()
    assert state.reorder(torch.tensor([2, 2, 0])).position.tolist() == [2, 2, 0]


def test_cat_undoes_index() -> None:
    state = model_state()
    joined = State.cat([state[0], state[1:]])
    for leaf, whole in zip(tensors(joined), tensors(state), strict=True):
        assert torch.equal(leaf, whole)


def test_cat_of_unequal_lengths() -> None:
    short, long = attention_state((1, 0)), attention_state((4,))
    joined = AttentionState.cat([short, long])
    assert joined.keys.shape == (3, 4, 2, 4)
    assert joined.lengths.tolist() == [1, 0, 4]
    assert torch.equal(joined.keys[0, :1], short.keys[0])
    assert torch.equal(joined.values[2], long.values[0])


def test_cat_refuses() -> None:
    state = mamba_state()
    with pytest.raises(ValueError, match="at least one"):
        MambaState.cat([])
    with pytest.raises(TypeError, match="AttentionState"):
        MambaState.cat([state, attention_state()])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"MambaState\.ssm differ in more than the batch"):
        MambaState.cat([state, dataclasses.replace(state, ssm=torch.zeros(3, 8, 5))])
    with pytest.raises(ValueError, match=r"AttentionState\.conv is missing"):
        AttentionState.cat([attention_state(), dataclasses.replace(attention_state(), conv=None)])
    with pytest.raises(ValueError, match=r"State\.layers differ in number"):
        State.cat([model_state(), State((state,), torch.arange(3))])


def test_sizes() -> None:
    state = State((mamba_state(2),), torch.arange(2))
    assert state.batch_size == 2
    assert state.nbytes == 4 * 2 * 8 * (3 + 4) + 2 * 8


def test_pytree_round_trip() -> None:
    state = model_state()
    leaves, spec = pytree.tree_flatten(state)
    same = pytree.tree_unflatten(leaves, spec)
    assert isinstance(same, State)
    assert isinstance(same.layers[1], AttentionState)
    assert all(a is b for a, b in zip(tensors(same), tensors(state), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    layer, x = Mamba(8, d_state=4), torch.randn(2, 6, 8, requires_grad=True)
    state = layer(torch.randn(2, 3, 8), return_state=True)[1].detach()
    layer(x, state).sum().backward()
    plain, x.grad = x.grad, None
    checkpoint(layer, x, state, use_reentrant=use_reentrant).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, plain)


def test_layers_refuse_other_kinds_of_state() -> None:
    with pytest.raises(TypeError, match="a MambaState, got a AttentionState"):
        Mamba(8)(torch.zeros(3, 1, 8), attention_state())
