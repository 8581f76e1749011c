"""The interpreter of Gluon's kernels finds what a kernel does wrong, however its threads happen to run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.ops import gluon_interpreter as gl
from tests.ops import shared_memory
from tests.ops.gluon_interpreter import MBARRIER, Memory
from tests.ops.shared_memory import RUNNING, Barriers

SIDE, STAGES, TILES = 4, 2, 7


def descriptor(base: Tensor) -> SimpleNamespace:
    return SimpleNamespace(base=base, shape=base.shape, strides=base.stride(), block_shape=[SIDE, SIDE])


def copy(fault: str, source: SimpleNamespace, tiles: Memory, full: Barriers, empty: Barriers) -> None:
    for i in range(TILES):
        stage = i % STAGES
        if fault != "nothing is waited for":
            MBARRIER.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        MBARRIER.expect(full.index(stage), SIDE * SIDE * (4 if fault == "too many bytes are expected" else 2))
        gl.copy_in(source, [i * SIDE, 0], full.index(stage), tiles.index(stage))


def square(
    fault: str, target: SimpleNamespace, tiles: Memory, results: Memory, full: Barriers, empty: Barriers
) -> None:
    """target_i = tile_i tile_iᵀ"""
    zero = torch.zeros(SIDE, SIDE)
    for i in range(TILES):
        stage = i % STAGES
        tile = tiles.index(stage)
        if fault != "copies are not waited for":
            MBARRIER.wait(full.index(stage), (i // STAGES) & 1)
        if fault == "a tile is given back too early":
            MBARRIER.arrive(empty.index(stage), count=1)
        product = gl.product(tile, tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        product = gl.products_done(1 if fault == "a product is not waited for" else 0, [product])
        if fault != "a tile is given back too early":
            MBARRIER.arrive(empty.index(stage), count=1)
        if fault != "results are overwritten":
            gl.copies_done(0)
        results.store(product.to(torch.bfloat16))
        if fault != "no fence":
            RUNNING.task.fence()
        gl.copy_out(target, [i * SIDE, 0], results)
    if fault != "the end is not waited for":
        gl.copies_done(0)


def run(fault: str, readers: int, writers: int) -> tuple[Tensor, list[Tensor]]:
    """The tiles, and what each of two tasks made of them; barriers count so many."""
    source = torch.randn(TILES * SIDE, SIDE).bfloat16()
    targets = [torch.zeros(TILES * SIDE, SIDE).bfloat16() for _ in range(2)]
    tiles = gl.allocate(torch.bfloat16, [STAGES, SIDE, SIDE], None)
    results = gl.allocate(torch.bfloat16, [2, SIDE, SIDE], None)
    full, empty = (gl.allocate(torch.int64, [STAGES, 1], None) for _ in range(2))
    for k in range(STAGES):
        MBARRIER.init(full.index(k), writers)
        MBARRIER.init(empty.index(k), readers)
    squares = [
        (square, (fault, descriptor(target), tiles, results.index(k), full, empty)) for k, target in enumerate(targets)
    ]
    gl.warp_specialize([(copy, (fault, descriptor(source), tiles, full, empty)), *squares], None, None)
    return source, targets


def test_a_kernel_that_is_right() -> None:
    source, targets = run("", readers=2, writers=1)
    tiles = source.view(TILES, SIDE, SIDE)
    expected = torch.bmm(tiles.float(), tiles.float().mT).bfloat16().flatten(0, 1)
    assert all(torch.equal(target, expected) for target in targets)


@pytest.mark.parametrize(
    ("fault", "readers", "writers", "message"),
    [
        ("", 1, 1, "is written while it is in use|more arrive|before it is written|in vain"),
        ("", 3, 1, "in vain"),
        ("", 2, 2, "in vain"),
        ("nothing is waited for", 2, 1, "is written while it is in use|more arrive"),
        ("too many bytes are expected", 2, 1, "in vain"),
        ("copies are not waited for", 2, 1, "nothing was written to|before it is written|more arrive"),
        ("a tile is given back too early", 2, 1, "is written while it is in use|before it is written"),
        ("a product is not waited for", 2, 1, "is written while it is in use"),
        ("results are overwritten", 2, 1, "is written while it is in use"),
        ("no fence", 2, 1, "without a fence"),
        ("the end is not waited for", 2, 1, "ends while shared memory is being copied"),
    ],
)
def test_a_kernel_that_is_wrong(
    fault: str, readers: int, writers: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "PATIENCE", 0.5)
    with pytest.raises(AssertionError, match=message):
        run(fault, readers, writers)


def test_products_are_nan_until_they_were_waited_for() -> None:
    tile = gl.allocate(torch.bfloat16, [SIDE, SIDE], None)
    tile.store(torch.ones(SIDE, SIDE).bfloat16())
    RUNNING.task.fence()
    first = gl.product(tile, tile, torch.zeros(SIDE, SIDE), use_acc=False, is_async=True)
    second = gl.product(tile, tile, first, is_async=True)
    assert first.isnan().all()
    gl.products_done(1, [first])
    assert (first == SIDE).all()
    assert second.isnan().all()
    assert (gl.products_done(0, [second]) == 2 * SIDE).all()
