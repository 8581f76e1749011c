"""Many prompts, each beginning that several share read once and its state handed on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from mambalm.generation.reading import read

if TYPE_CHECKING:
    from mambalm.generation.engine import Engine
    from mambalm.layers.state import State

Tokens = tuple[int, ...]
_T = TypeVar("_T")
# Tokens of a shared beginning from which on a state of its own is worth a call of its own.
_WORTH = 32


class Rows(NamedTuple):
    """Prompts that are to be read together.

    Attributes:
        numbers: which of the prompts these are.
        rests: what is left to read of each (l_i), at least a token.
        state: what was read before, a row for each; None: nothing.
    """

    numbers: list[int]
    rests: list[Tensor]
    state: State | None


class Group(NamedTuple):
    """Prompts, by their numbers, and how many tokens they begin with in common; 0 of one that shares too few."""

    numbers: list[int]
    shared: int


def shared_batches(engine: Engine, prompts: Sequence[Tokens], batch_size: int) -> Iterator[Rows]:
    """Go through prompts in batches, those with a common beginning behind one reading of it.

    Args:
        engine: with the model.
        prompts: the token ids of each, at least one.
        batch_size: rows of a batch at most, and beginnings whose states are held at once.
    """
    found = groups(prompts)
    alone = [group.numbers[0] for group in found if not group.shared]
    for numbers in batches(alone, batch_size):
        yield Rows(numbers, [torch.tensor(prompts[number]) for number in numbers], None)
    for some in batches([group for group in found if group.shared], batch_size):
        heads = [torch.tensor(prompts[numbers[0]][:shared]) for numbers, shared in some]
        _, states = read(engine.model, heads, graphs=engine.chunks)
        rows = [(number, index) for index, group in enumerate(some) for number in group.numbers]
        for part in batches(rows, batch_size):
            rests = [torch.tensor(prompts[number][some[index].shared :]) for number, index in part]
            yield Rows([number for number, _ in part], rests, states.index([index for _, index in part]))


def groups(prompts: Sequence[Tokens]) -> list[Group]:
    """The prompts in groups with a common beginning, behind which a token is left of each.

    Of all ways to group neighbours in lexicographic order this is the one that saves most: the tokens that a group
    shares, times its prompts but one. The groups that could be form a tree, the one of the prompts' intervals of equal
    beginnings (Abouelhoda et al. 2004, doi:10.1016/S1570-8667(03)00065-0), which a stack goes through from below.
    """
    order = sorted(range(len(prompts)), key=lambda number: prompts[number])
    # (tokens shared, first of its members, saved by the groups within it, those groups)
    stack: list[tuple[int, int, int, list[Group]]] = [(0, 0, 0, [])]
    for place, number in enumerate(order, 1):
        following = order[place] if place < len(order) else None
        common = 0 if following is None else _common(prompts[number], prompts[following])
        common = common if common >= _WORTH else 0
        saved, within, first = 0, [Group([number], 0)], place - 1
        while common < stack[-1][0]:
            shared, first, below, parts = stack.pop()
            parts.extend(within)
            saved, within = below + saved, parts
            if shared * (place - first - 1) >= saved:
                saved, within = shared * (place - first - 1), [Group(order[first:place], shared)]
        if common > stack[-1][0]:
            stack.append((common, first, saved, within))
        else:
            shared, first, below, parts = stack.pop()
            parts.extend(within)
            stack.append((shared, first, below + saved, parts))
    return stack[0][3]


def batches(items: Sequence[_T], size: int) -> Iterator[list[_T]]:
    """The items in lists of at most so many."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _common(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with, less than either has."""
    most = min(len(one), len(other)) - 1
    return next((at for at in range(most) if one[at] != other[at]), most)
