"""Fake quantization with a scale for each token or image."""

import copy
import pickle

import pytest
import torch

from quant2e.annotation.granularity import PerAxis, PerGroup, PerTensor, PerToken
from quant2e.errors import AnnotationError, CalibrationError
from quant2e.graph.qdq_ops import qd
from quant2e.observers.dynamic_fake_quant import DynamicFakeQuantize
from quant2e.observers.encodings import DynamicEncoding, encode
from quant2e.observers.placeholder import PlaceholderObserver

INT8 = (-128, 127, torch.int8)
MAKE = {"dtype": torch.int8, "is_dynamic": True}
X = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-1, 2).view(3, 1, 1, 1)


def by_token(x):
    scale, zero = qd.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    q = qd.quantize_per_token.default(x, scale, zero, *INT8)
    return qd.dequantize_per_token.default(q, scale, zero, *INT8, torch.float32)


def by_image(x):
    scale, zero = (p.flatten() for p in qd.choose_qparams_per_token_asymmetric.default(x.flatten(1), torch.int8))
    q = qd.quantize_per_channel.default(x, scale, zero, 0, *INT8)
    return qd.dequantize_per_channel.default(q, scale, zero, 0, *INT8)


def whole(x):
    scale, zero = qd.choose_qparams.tensor(x, -128, 127, 2**-23, torch.int8)
    q = qd.quantize_per_tensor.tensor(x, scale, zero, *INT8)
    return qd.dequantize_per_tensor.tensor(q, scale, zero, *INT8)


@pytest.mark.parametrize(("granularity", "ops"), [(PerToken(), by_token), (PerAxis(0), by_image), (PerTensor(), whole)])
def test_the_bits_of_the_ops(granularity, ops):
    fake = DynamicFakeQuantize(granularity, **MAKE)
    empty = () if granularity == PerTensor() else (X[:0],)
    for x in (X, X.abs() + 5, -X.abs(), X * 0, *empty):
        assert torch.equal(fake(x), ops(x))
    assert not torch.equal(ops(X), X)
    for same in (copy.deepcopy(fake), pickle.loads(pickle.dumps(fake))):
        assert torch.equal(same(X), fake(X))
    fake.disable_fake_quant()
    assert fake(X) is X


def test_gradients_pass_but_where_an_end_was_cut_off():
    # the second row's ends are 127.5 steps of 1 from zero: one rounds to 128
    x = torch.tensor([[0.0, 1.0, 2.0], [-127.5, 1.0, 127.5]], requires_grad=True)
    y = DynamicFakeQuantize(PerToken(), **MAKE)(x)
    y.backward(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert y[1].tolist() == [-128, 1, 127]
    assert x.grad.tolist() == [[1, 2, 3], [4, 5, 0]]


def test_what_conversion_reads():
    for granularity in (PerToken(), PerAxis(0)):
        for made in (DynamicFakeQuantize(granularity, **MAKE), PlaceholderObserver(granularity=granularity, **MAKE)):
            assert encode(made) == DynamicEncoding(
                symmetric=False, eps=2**-23, quant_min=-128, quant_max=127, dtype=torch.int8, granularity=granularity
            )
    assert encode(PlaceholderObserver(**MAKE)).granularity == PerTensor()
    with pytest.raises(CalibrationError, match="each tensor has its own"):
        DynamicFakeQuantize(**MAKE).calculate_qparams()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({**MAKE, "granularity": PerGroup(32)}, r"PerGroup\(group_size=32\): scales found at run time"),
        ({**MAKE, "granularity": PerAxis(1)}, r"PerAxis\(axis=1\): scales found at run time"),
        ({"dtype": torch.int8, "granularity": PerToken()}, r"is_dynamic=True"),
        ({**MAKE, "dtype": torch.uint8, "granularity": PerToken()}, r"torch.uint8 in \[0, 255\]"),
        ({**MAKE, "quant_min": -127, "quant_max": 127, "granularity": PerToken()}, r"in \[-127, 127\]"),
        ({**MAKE, "qscheme": torch.per_tensor_symmetric, "granularity": PerToken()}, "per_tensor_symmetric"),
    ],
)
def test_scales_that_no_op_finds_are_refused(arguments, message):
    with pytest.raises(AnnotationError, match=message):
        PlaceholderObserver(**arguments)
