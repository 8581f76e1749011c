"""The packed layouts beside a plain restatement: what they stand for, and how near that is to the weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambalm.quantization.layout import GROUP
from mambalm.quantization.schemes import quantize
from tests.helpers import relative_error

SHAPES = [(8, 128), (10, 64), (7, 96), (1, 1), (5, 200)]
# The error of rounding Gaussian weights: about a quarter of a step of 1 / 127 and of 1 / 8 of a group's largest.
ALLOWED = {8: 0.008, 4: 0.115}


def levels(weight: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor]:
    """The weights of a group of each row, and how many of its scales each is, from the unpacked weight itself."""
    packed = quantize(weight, bits)
    columns = slice(group * GROUP, (group + 1) * GROUP)
    layout = packed.scales if bits == 8 else packed.scales.transpose(2, 3).flatten(1, 2)
    scales = layout.transpose(1, 2).flatten(0, 1)[: len(weight), group, None].float()
    return weight[:, columns], packed.unpack()[:, columns] / scales


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_packed_weight_is_near_the_weight(shape: tuple[int, int], bits: int) -> None:
    weight = torch.randn(shape)
    unpacked = quantize(weight, bits).unpack()
    assert unpacked.shape == shape
    assert relative_error(unpacked, weight) < ALLOWED[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_values_are_integers_of_so_many_bits(bits: int) -> None:
    for group in range(2):
        _, values = levels(torch.randn(6, 128) * torch.logspace(-3, 3, 6)[:, None], group, bits)
        assert relative_error(values, values.round()) < 1e-6
        lowest, highest = (-127, 127) if bits == 8 else (-8, 7)
        assert lowest <= values.min().round()
        assert values.max().round() <= highest
        # The largest weight is at an end of the range.
        assert (values.abs().amax(1).round() >= highest - 1).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_every_position_keeps_its_place(bits: int) -> None:
    weight = torch.zeros(6, 256)
    for row, column in ((0, 0), (1, 17), (2, 63), (3, 64), (4, 130), (5, 255)):
        weight[row, column] = row + 1.0
    unpacked = quantize(weight, bits).unpack()
    assert torch.equal(unpacked != 0, weight != 0)
    assert relative_error(unpacked, weight) < 4e-3  # the scales are bfloat16


def test_a_weight_that_fits_is_kept_exactly() -> None:
    weight = torch.randint(-8, 8, (8, 128)).float()
    weight[:, ::GROUP] = -8
    assert torch.equal(quantize(weight, 4).unpack(), weight)
    weight = torch.randint(-127, 128, (8, 128)).float()
    weight[:, ::GROUP] = 127
    assert torch.equal(quantize(weight * 0.5, 8).unpack(), weight * 0.5)


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.full((4, 64), torch.inf), 8)
    with pytest.raises(ValueError, match="8 or 4, got 3"):
        quantize(torch.randn(4, 64), 3)
