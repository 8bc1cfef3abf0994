"""What the int8 patterns would get wrong is found, named, and computed in float with the same result."""

import pytest
import torch
from torch import nn

from lowering.inductor.guard import keep_from_patterns
from lowering.inductor.pipeline import Rewritten
from lowering.inductor.rewrites.graph import private_copy
from quant2e import quantize
from quant2e.cpu import TARGETS
from quant2e.graph.qdq_ops import qd
from tests.lowering.graphs import Weight, on_grid
from tests.lowering.inductor.rewrites.test_pipeline import Fn, weight
from tests.quant2e.integer.test_graph import x86

F = torch.nn.functional
UINT8 = torch.uint8
X, IMAGE = torch.randn(4, 16), torch.randn(1, 8, 6, 6)


def u8(x):
    return on_grid(x, (0.03, 128), UINT8)


def int16(x):
    args = (0.001, 0, -32768, 32767, torch.int16)
    return qd.dequantize_per_tensor.default(qd.quantize_per_tensor.default(x, *args), *args)


# what, inputs, weight, reason
TABLE = {
    "linear": (lambda m, x: F.linear(u8(x), m.w()), X, weight(8, 16), None),
    "convolution": (lambda m, x: F.conv2d(u8(x), m.w()), IMAGE, weight(8, 8, 3, 3), None),
    "float activation": (lambda m, x: F.linear(x, m.w()), X, weight(8, 16, zero_point=3), None),
    "transposed": (lambda m, x: F.conv_transpose2d(u8(x), m.w()), IMAGE, weight(8, 8, 3, 3), "along axis 0"),
    "transposed, by flag": (
        lambda m, x: torch.ops.aten.convolution(u8(x), m.w(), None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1),
        IMAGE, weight(8, 8, 3, 3), "along axis 0",
    ),
    "transposed, by output channel": (
        lambda m, x: F.conv_transpose2d(u8(x), m.w()), IMAGE, weight(8, 8, 3, 3, axis=1), None,
    ),
    "input channels": (lambda m, x: F.linear(u8(x), m.w()), X, weight(8, 16, axis=1), "along axis 1"),
    "input channels of a product": (lambda m, x: u8(x) @ m.w().t(), X, weight(8, 16, axis=1), "along axis 1"),
    # however the transposition is spelled, Inductor makes one op of it, and its patterns see the same
    "input channels, mT": (lambda m, x: u8(x) @ m.w().mT, X, weight(8, 16, axis=1), "along axis 1"),
    "input channels, swapaxes": (lambda m, x: u8(x) @ m.w().swapaxes(0, 1), X, weight(8, 16, axis=1), "along axis 1"),
    "input channels, movedim": (lambda m, x: u8(x) @ m.w().movedim(0, 1), X, weight(8, 16, axis=1), "along axis 1"),
    "asymmetric weight, cloned": (lambda m, x: F.linear(u8(x), m.w().clone()), X, weight(8, 16, zero_point=3),
        "zero points other than 0"),
    "asymmetric weight": (lambda m, x: F.linear(u8(x), m.w()), X, weight(8, 16, zero_point=3),
        "zero points other than 0"),
    "16-bit activation": (lambda m, x: F.linear(int16(x), m.w()), X, weight(8, 16), "8-bit activations"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_refused_or_not(case, monkeypatch):
    monkeypatch.setattr("lowering.inductor.guard.detect", lambda: TARGETS["avx512_vnni"])
    function, x, w, reason = TABLE[case]
    model = torch.export.export(Fn(function, w=w).eval(), (x,), strict=False).module()
    copy = private_copy(model)
    reasons = list(keep_from_patterns(copy).values())
    copy.recompile()
    assert torch.equal(copy(x)[0], model(x))
    dequantizes = [n for n in copy.graph.nodes if n.target is qd.dequantize_per_tensor.default]
    if reason is None:
        assert reasons == []
    else:
        assert len(reasons) == 1
        assert reason in reasons[0]
        assert dequantizes == []


def again(scale, zero_point, low=0, high=255):
    def requantize(x):
        args = (scale, zero_point, low, high, UINT8)
        return qd.dequantize_per_tensor.default(qd.quantize_per_tensor.default(x, *args), *args)

    return requantize


MOVED = {
    "pool, same numbers": (lambda m, x: again(0.03, 128)(F.max_pool2d(u8(x), 2)), 2),
    "pool, another scale": (lambda m, x: again(0.06, 128)(F.max_pool2d(u8(x), 2)), 1),
    "pool, another zero point": (lambda m, x: again(0.03, 100)(F.max_pool2d(u8(x), 2)), 1),
    "view, narrower range": (lambda m, x: again(0.03, 128, 0, 200)(u8(x).view(4, -1)), 1),
    "swapaxes, another scale": (lambda m, x: again(0.06, 128)(u8(x).swapaxes(1, 2)), 1),
    "clone, another scale": (lambda m, x: again(0.06, 128)(u8(x).clone()), 1),
    "stack, one of two differs": (lambda m, x: again(0.03, 128)(torch.stack([u8(x), again(0.03, 7)(x)])), 2),
    "cat, one of two differs": (lambda m, x: again(0.03, 128)(torch.cat([u8(x), again(0.03, 7)(x)])), 2),
}


@pytest.mark.parametrize("case", MOVED)
def test_integers_move_only_between_equal_parameters(case):
    function, kept = MOVED[case]
    model = torch.export.export(Fn(function).eval(), (IMAGE,), strict=False).module()
    copy = private_copy(model)
    assert keep_from_patterns(copy) == {}
    copy.recompile()
    assert torch.equal(copy(IMAGE)[0], model(IMAGE))
    assert sum(n.target is qd.dequantize_per_tensor.default for n in copy.graph.nodes) == kept


def test_without_vnni_only_what_cannot_saturate_is_int8(monkeypatch):
    monkeypatch.setattr("lowering.inductor.guard.detect", lambda: TARGETS["avx2"])

    def reasons(low, high):
        def function(m, x):
            args = (0.03, 0, low, high, UINT8)
            return F.linear(qd.dequantize_per_tensor.default(qd.quantize_per_tensor.default(x, *args), *args), m.w())

        model = torch.export.export(
            Fn(function, w=Weight(torch.randn(8, 16), steps=127)).eval(), (X,), strict=False
        ).module()
        return keep_from_patterns(private_copy(model))

    assert reasons(0, 127) == {}
    assert "reduce_range=True" in reasons(0, 255)["linear"]


def test_products_that_read_one_conversion_are_all_named():
    def both(m, x):
        half, w = int16(x).to(torch.bfloat16), m.w().to(torch.bfloat16)
        return F.linear(half, w) + F.linear(half, w)

    model = torch.export.export(Fn(both, w=weight(8, 16)).eval(), (X,), strict=False).module()
    copy = private_copy(model)
    assert keep_from_patterns(copy) == dict.fromkeys(
        ("linear", "linear_1"), "int8 kernels take 8-bit activations, not torch.int16"
    )
    copy.recompile()
    assert torch.equal(copy(X)[0], model(X))


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Conv1d(1, 3, 5), (4, 1, 12), "one channel"),
        (nn.Conv2d(1, 3, 3), (4, 1, 6, 6), "one channel"),
    ],
    ids=["conv1d", "conv2d"],
)
def test_a_report_has_the_reason_under_the_name_that_the_user_knows(layer, shape, reason):
    """Also where a rewrite has given the op another one: a conv1d is lowered as a conv2d."""
    x = torch.randn(shape)
    sizes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    quantized = quantize(nn.Sequential(layer, nn.ReLU()).eval(), (x,), x86(), [x, x + 0.1], dynamic_shapes=sizes)
    (op,) = Rewritten(quantized.module, "onednn").report(()).leftovers
    assert op.name == f"conv{x.dim() - 2}d"
    assert reason in op.reason
