import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.annotation.specs import INTEGER_BOUNDS
from quant2e.errors import AnnotationError
from quant2e.graph.qdq_ops import qd
from quant2e.ranges.qparams import (
    FLOAT32_EPS,
    SMALLEST_SCALE,
    NumberFormat,
    dequantize_per_channel,
    dequantize_per_tensor,
    fake_quantize_per_tensor,
    plain_dtype,
    quantize_per_channel,
    quantize_per_tensor,
)

AFFINE, SYMMETRIC = torch.per_tensor_affine, torch.per_tensor_symmetric
I8, U8, I16, U16, I32 = torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32


def grid(dtype, qscheme, low, high, **more):
    return NumberFormat(dtype=dtype, quant_min=low, quant_max=high, qscheme=qscheme, **more)


# dtype, scheme, quant_min, quant_max, custom, min, max -> scale, zero point
TABLE = [
    (I8, AFFINE, -128, 127, False, -1.0, 1.0, 2 / 255, -1),  # in float32, 1 / scale is just below 127.5
    (U8, AFFINE, 0, 255, False, -1.0, 1.0, 2 / 255, 127),
    (U8, AFFINE, 0, 255, False, 0.0, 2.55, 2.55 / 255, 0),
    (U8, AFFINE, 0, 255, False, 5.0, 6.0, 6 / 255, 0),  # extended to include zero
    (U8, AFFINE, 0, 255, False, -6.0, -5.0, 6 / 255, 255),
    (I8, AFFINE, -8, 7, True, -0.5, 1.0, 0.1, -3),
    (U8, AFFINE, 0, 127, True, -1.0, 3.0, 4 / 127, 32),
    (I8, SYMMETRIC, -128, 127, False, -1.0, 0.5, 1 / 127.5, 0),
    (I8, SYMMETRIC, -127, 127, True, -1.0, 0.5, 1 / 127, 0),
    (I8, SYMMETRIC, -8, 7, True, -3.0, 3.0, 0.4, 0),
    (U8, SYMMETRIC, 0, 255, False, -1.0, 0.5, 1 / 127.5, 128),
    (U8, SYMMETRIC, 0, 255, True, -1.0, 0.5, 1 / 127.5, 127),  # the author gave the bounds: their middle
    (U8, SYMMETRIC, 0, 127, True, -1.0, 0.5, 1 / 63.5, 63),
    (U16, SYMMETRIC, 0, 65535, False, -1.0, 1.0, 1 / 32767.5, 32768),
    (U16, SYMMETRIC, 0, 1023, True, -1.0, 1.0, 1 / 511.5, 511),  # 32768 would lie outside
    (I16, SYMMETRIC, -32768, 32767, False, -2.0, 1.0, 2 / 32767.5, 0),
    (I16, AFFINE, -32768, 32767, False, 0.0, 65.535, 65.535 / 65535, -32768),
    (I32, SYMMETRIC, -(2**31), 2**31 - 1, False, -4096.0, 1.0, 4096 / (2**31 - 0.5), 0),
    (I32, AFFINE, -(2**31), 2**31 - 1, False, -4096.0, 0.0, 4096 / (2**32 - 1), 2**31 - 1),
    (I8, AFFINE, -128, 127, False, 0.0, 0.0, FLOAT32_EPS, -128),
    (I8, SYMMETRIC, -128, 127, False, 0.0, 1e-30, FLOAT32_EPS, 0),
]


@pytest.mark.parametrize(
    ("dtype", "qscheme", "low", "high", "custom", "min_val", "max_val", "scale", "zero_point"), TABLE
)
def test_scale_and_zero_point(dtype, qscheme, low, high, custom, min_val, max_val, scale, zero_point):
    chosen = grid(dtype, qscheme, low, high, custom_range=custom)
    s, z = chosen.qparams(torch.tensor(min_val), torch.tensor(max_val))
    assert (s.dtype, s.shape, z.dtype, z.shape) == (torch.float32, (1,), torch.int64, (1,))
    assert s.item() == pytest.approx(scale, rel=2e-7, abs=0)
    assert z.item() == zero_point


def test_float_zero_points():
    chosen = grid(U8, torch.per_channel_affine_float_qparams, 0, 255)
    scale, zero_point = chosen.qparams(torch.tensor([1.0, -1.0, 3.0]), torch.tensor([3.55, 1.0, 3.0]))
    torch.testing.assert_close(scale, torch.tensor([0.01, 2 / 255, 1.0]))
    torch.testing.assert_close(zero_point, torch.tensor([-100.0, 127.5, -3.0]))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200, deadline=None)
@given(
    floats,
    floats,
    st.sampled_from(sorted(INTEGER_BOUNDS, key=str)),
    st.booleans(),
    st.sampled_from([0.0, 1e-45, 2**-12]),
)
def test_parameters_are_always_usable(a, b, dtype, symmetric, eps):
    low, high = INTEGER_BOUNDS[dtype]
    chosen = grid(dtype, SYMMETRIC if symmetric else AFFINE, low, high, eps=eps)
    s, z = chosen.qparams(torch.tensor(min(a, b)), torch.tensor(max(a, b)))
    assert max(SMALLEST_SCALE, eps) <= s.item() < math.inf
    assert math.isfinite(1 / s.item())
    assert low <= z.item() <= high
    if dtype != I32:  # float32 does not hold its zero points
        zero = fake_quantize_per_tensor(torch.zeros(1), s.item(), z.item(), low, high, dtype)
        assert zero.item() == 0


@settings(max_examples=100, deadline=None)
@given(floats, floats, st.booleans(), st.sampled_from([0.0, 2**-12, 3e-3]))
def test_power_of_two_scales_are_the_next_above(a, b, symmetric, eps):
    qscheme = SYMMETRIC if symmetric else AFFINE
    ranges = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    free, _ = grid(I8, qscheme, -128, 127, eps=eps).qparams(*ranges)
    scale, zero_point = grid(I8, qscheme, -128, 127, eps=eps, power_of_two=True).qparams(*ranges)
    assert math.frexp(scale.item())[0] == 0.5
    assert free.item() <= scale.item() < 2 * free.item()
    assert -128 <= zero_point.item() <= 127


def test_power_of_two_scales_with_a_zero_point():
    scale, zero_point = grid(U8, AFFINE, 0, 255, power_of_two=True).qparams(torch.tensor(-1.0), torch.tensor(2.0))
    assert (scale.item(), zero_point.item()) == (2**-6, 64)  # 3 / 255 lies between 2**-7 and 2**-6
    with pytest.raises(AnnotationError, match="power_of_two with"):
        grid(U8, torch.per_channel_affine_float_qparams, 0, 255, power_of_two=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float16, "quant_min": 0, "quant_max": 1}, "integers of one of"),
        ({"dtype": I8, "quant_min": -129, "quant_max": 1}, "-128 <= quant_min"),
        ({"dtype": I8, "quant_min": 5, "quant_max": 5}, "quant_min < quant_max"),
        ({"dtype": I8, "quant_min": 1, "quant_max": 5}, "must include 0"),
        ({"dtype": I8, "quant_min": -1, "quant_max": 5, "eps": math.nan}, "eps=nan"),
        ({"dtype": I8, "quant_min": -1, "quant_max": 5, "eps": -1.0}, "eps=-1.0"),
        ({"dtype": I8, "quant_min": -1, "quant_max": 5, "qscheme": None}, "qscheme=None"),
    ],
)
def test_a_bad_grid_is_refused(arguments, message):
    with pytest.raises(AnnotationError, match=message):
        NumberFormat(**arguments)


def test_plain_dtype():
    assert [plain_dtype(d) for d in (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, I16)] == [
        I8,
        U8,
        I32,
        U8,
        I16,
    ]


STORAGE = [(I8, -128, 127), (I8, -8, 7), (U8, 0, 255), (I16, -32768, 32767), (U16, 0, 65535), (I32, -(2**20), 2**20)]


@pytest.mark.parametrize(("dtype", "low", "high"), STORAGE)
@pytest.mark.parametrize("real", [torch.float32, torch.float16, torch.bfloat16])
def test_per_tensor_arithmetic_is_the_dialects(dtype, low, high, real):
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 40).to(real)
    for scale, zero_point in [(0.1, 0), (0.0123, high // 3), (1e-9, low), (3.0, high)]:
        arguments = (scale, zero_point, low, high, dtype)
        expected = qd.quantize_per_tensor.default(x, *arguments)
        q = quantize_per_tensor(x, *arguments)
        assert torch.equal(q, expected)
        assert q.dtype == dtype
        back = qd.dequantize_per_tensor.default(expected, *arguments)
        assert torch.equal(dequantize_per_tensor(q, scale, zero_point), back)
        assert torch.equal(fake_quantize_per_tensor(x, *arguments), back)


@pytest.mark.parametrize(("dtype", "low", "high"), [row for row in STORAGE if row[0] != U16])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_channel_arithmetic_is_the_dialects(dtype, low, high, axis):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 5, generator=g) * 10
    channels = x.shape[axis]
    scales = torch.rand(channels, generator=g) + 0.01
    zero_points = torch.randint(max(low, -100), min(high, 100), (channels,), generator=g)
    arguments = (scales, zero_points, axis, low, high, dtype)
    expected = qd.quantize_per_channel.default(x, *arguments)
    q = quantize_per_channel(x, *arguments)
    assert torch.equal(q, expected)
    back = qd.dequantize_per_channel.default(expected, *arguments)
    assert torch.equal(dequantize_per_channel(q, scales, zero_points, axis), back)
    symmetric = qd.dequantize_per_channel.default(expected, scales, None, axis, low, high, dtype)
    assert torch.equal(dequantize_per_channel(q, scales, None, axis), symmetric)


def test_per_channel_uint16_which_the_dialect_cannot_dequantize():
    x = torch.tensor([[-1.0, 0.0, 2.0], [1.0, 5.0, 70000.0]])
    scales, zero_points = torch.tensor([0.5, 1.0]), torch.tensor([10, 0])
    q = quantize_per_channel(x, scales, zero_points, 0, 0, 65535, U16)
    assert q.tolist() == [[8, 10, 14], [1, 5, 65535]]
    assert dequantize_per_channel(q, scales, zero_points, 0).tolist() == [[-1.0, 0.0, 2.0], [1.0, 5.0, 65535.0]]


def test_integers_are_not_quantized():
    with pytest.raises(TypeError, match="only floating-point tensors"):
        quantize_per_tensor(torch.ones(2, dtype=torch.int64), 1.0, 0, -128, 127, I8)


def test_known_answer_of_narrow_range_8_bits():
    """The published example of NVIDIA's tensor_quant: integers +-127, scale there 127 / amax."""
    torch.manual_seed(12345)
    x = torch.rand(10)
    scale, zero_point = grid(I8, SYMMETRIC, -127, 127, custom_range=True).qparams(x.min(), x.max())
    assert 1 / scale.item() == pytest.approx(128.0057, abs=1e-4)
    arguments = (scale.item(), zero_point.item(), -127, 127, I8)
    assert quantize_per_tensor(x, *arguments).tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]
    published = [0.9843, 0.8828, 0.9921, 0.4609, 0.0859, 0.1797, 0.3672, 0.5703, 0.3359, 0.2109]
    torch.testing.assert_close(fake_quantize_per_tensor(x, *arguments), torch.tensor(published), atol=1e-4, rtol=0)
