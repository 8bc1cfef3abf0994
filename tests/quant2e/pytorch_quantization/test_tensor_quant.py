"""tensor_quant and fake_tensor_quant: known answers, a float64 reference, torch's own op, gradients, edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.errors import AnnotationError, CalibrationError
from quant2e.pytorch_quantization import fake_tensor_quant, tensor_quant

KNOWN = [0.9817, 0.8796, 0.9921, 0.4611, 0.0832, 0.1784, 0.3674, 0.5676, 0.3376, 0.2119]
FAKE = [0.9843, 0.8828, 0.9921, 0.4609, 0.0859, 0.1797, 0.3672, 0.5703, 0.3359, 0.2109]
INTEGERS = [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]


def test_the_known_answer():
    torch.manual_seed(12345)
    x = torch.rand(10)
    torch.testing.assert_close(x, torch.tensor(KNOWN), atol=5e-5, rtol=0)
    torch.testing.assert_close(fake_tensor_quant(x, x.abs().max()), torch.tensor(FAKE), atol=5e-5, rtol=0)
    integers, scale = tensor_quant(x, x.abs().max())
    assert integers.tolist() == INTEGERS
    assert scale.item() == pytest.approx(128.0057, abs=5e-5)


@pytest.mark.parametrize(
    ("bits", "unsigned", "narrow", "low", "high"),
    [(8, False, True, -127, 127), (8, False, False, -128, 127), (8, True, True, 0, 255), (4, False, True, -7, 7),
     (4, False, False, -8, 7), (2, False, True, -1, 1), (1, True, True, 0, 1), (16, False, True, -32767, 32767)],
)  # fmt: skip
def test_bounds(bits, unsigned, narrow, low, high):
    x = torch.linspace(0.0 if unsigned else -9.0, 9.0, 101)
    integers, scale = tensor_quant(x, 1.0, bits, unsigned, narrow)
    assert (int(integers.min()), int(integers.max())) == (low, high)
    assert scale.item() == high


@st.composite
def cases(draw):
    bits = draw(st.integers(2, 12))
    unsigned, narrow = draw(st.booleans()), draw(st.booleans())
    floats = st.floats(0.0 if unsigned else -50.0, 50.0, width=32)
    x = torch.tensor(draw(st.lists(floats, min_size=1, max_size=20)), dtype=torch.float32)
    return x, draw(st.floats(2**-10, 60.0, width=32)), bits, unsigned, narrow


@settings(deadline=None, max_examples=100)
@given(cases())
def test_against_exact_arithmetic_and_torch(case):
    """Equal but where a quotient lies next to a tie, which float32 settles either way: there, one step apart."""
    x, amax, bits, unsigned, narrow = case
    high = 2 ** (bits - 1 + unsigned) - 1
    low = 0 if unsigned else -high if narrow else -high - 1
    exact = x.double() * high / amax
    integers, scale = tensor_quant(x, amax, bits, unsigned, narrow)
    expected = exact.round().clamp(low, high)
    tie = ((exact - exact.floor()) - 0.5).abs() < 1e-5 * exact.abs().clamp(min=1)
    assert bool(((integers.double() == expected) | (tie & ((integers.double() - expected).abs() <= 1))).all())
    assert scale.item() == pytest.approx(high / amax, rel=1e-6)

    fake = fake_tensor_quant(x, amax, bits, unsigned, narrow)
    step = amax / high
    torch.testing.assert_close(fake.double(), integers.double() * step, rtol=1e-6, atol=0)
    theirs = torch.fake_quantize_per_tensor_affine(x, step, 0, low, high)
    apart = (fake - theirs).abs()
    assert bool(((apart <= 1e-6 * fake.abs()) | (tie & (apart <= step * 1.001))).all())
    inside = (x >= low * step) & (x <= amax)
    assert bool(((fake - x).abs() <= step / 2 * (1 + 1e-4))[inside].all())
    again = fake_tensor_quant(fake, amax, bits, unsigned, narrow)
    torch.testing.assert_close(again, fake, rtol=1e-6, atol=0)


def test_the_gradient_passes_within_amax_and_is_zero_outside():
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.3, 1.0, 1.0001], requires_grad=True)
    weights = torch.arange(1.0, 8.0)
    (fake_tensor_quant(x, 1.0) * weights).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]
    x.grad = None
    integers, scale = tensor_quant(x, 1.0)
    assert not scale.requires_grad
    (integers * weights).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]


def test_amax_broadcasts_over_one_axis_and_several():
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    for shape in ((3, 1, 1), (1, 4, 1), (3, 1, 5), (3, 4, 5), (5,)):
        amax = torch.rand(shape) + 0.5
        whole = fake_tensor_quant(x, amax)
        each = torch.stack([
            fake_tensor_quant(value, limit)
            for value, limit in zip(x.flatten(), amax.expand_as(x).flatten(), strict=True)
        ])  # fmt: skip
        assert torch.equal(whole, each.reshape(x.shape))


def test_magnitudes_too_small_give_zeros_and_scale_one():
    x = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    integers, scale = tensor_quant(x, torch.tensor([[0.0], [1.0]]))
    assert integers.tolist() == [[0, 0], [127, -127]]
    assert scale.flatten().tolist() == [1, 127]
    assert fake_tensor_quant(x, 2.0**-24).abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(dtype):
    x = torch.linspace(-2, 2, 41).to(dtype)
    fake = fake_tensor_quant(x, 1e-2)
    assert fake.dtype == dtype
    assert torch.equal(fake, fake_tensor_quant(x.double(), 1e-2).to(dtype))
    integers, scale = tensor_quant(x, 1e-6)
    assert integers.dtype == dtype
    assert bool(torch.isfinite(scale))


WRONG = [
    (lambda x: tensor_quant(x, -1.0), AnnotationError, "amax holds -1"),
    (lambda x: tensor_quant(x, float("nan")), AnnotationError, "amax holds nan"),
    (lambda x: tensor_quant(x, torch.ones(3)), AnnotationError, "does not broadcast"),
    (lambda x: tensor_quant(x[:1], torch.ones(4)), AnnotationError, "does not broadcast"),
    (lambda x: tensor_quant(x, 1.0, 0), AnnotationError, "num_bits=0"),
    (lambda x: tensor_quant(x, 1.0, 1), AnnotationError, "num_bits=1: a whole number from 2"),
    (lambda x: tensor_quant(x, 1.0, (4, 3)), AnnotationError, "floats of 8 bits"),
    (lambda x: tensor_quant(x, 1.0, unsigned=True), CalibrationError, "unsigned integers for values from -1"),
    (lambda x: tensor_quant(x.int(), 1.0), AnnotationError, "only floats"),
]


@pytest.mark.parametrize(("call", "kind", "said"), WRONG)
def test_what_raises(call, kind, said):
    with pytest.raises(kind, match=said):
        call(torch.tensor([-1.0, 1.0]))
