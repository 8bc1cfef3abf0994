"""Biases of the integer form: the integers themselves, which the fraction that is added behind them would hide."""

import pytest
import torch

from quant2e.integer.arithmetic.bias import bias_fraction, bias_integers


@pytest.mark.parametrize(
    ("steps", "expected"), [(0.4, 0), (0.6, 1), (1.5, 2), (2.5, 2), (-0.4, 0), (-0.6, -1), (-1.5, -2), (7.0, 7)]
)
def test_they_are_the_nearest_ties_to_even(steps, expected):
    assert bias_integers(torch.tensor([steps * 0.125]), 0.5, 0.25).tolist() == [expected]
    per_channel = torch.tensor([0.25, 0.5])
    assert bias_integers(steps * 0.5 * per_channel, 0.5, per_channel).tolist() == [expected, expected]


def test_the_fraction_is_what_they_leave():
    bias = torch.tensor([0.6, -0.4, 3.0])
    integers = bias_integers(bias, 1.0, 1.0)
    fraction = bias_fraction(bias, integers, 1.0, 1.0, span=1000)
    assert integers.tolist() == [1, 0, 3]
    assert fraction is not None
    assert (fraction.integers / 2.0**fraction.bits).tolist() == pytest.approx(
        [-0.4, -0.4, 0.0], abs=2.0**-fraction.bits
    )
    assert bias_fraction(torch.tensor([3.0]), torch.tensor([3]), 1.0, 1.0, span=1000) is None
