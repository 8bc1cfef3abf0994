"""What OpenVINO runs on integers, told from the graphs that it compiles, and where its kernels are exact."""

import numpy as np
import pytest
import torch

from lowering.openvino.precision import run_ops
from lowering.openvino.session import Session, read_model, tensors_taken
from quant2e.cpu import detect
from quant2e.errors import FileFormatError, LoweringError

openvino = pytest.importorskip("openvino")
op = pytest.importorskip("openvino.opset13")


def fake_quantized(x, levels=256):
    return op.fake_quantize(x, *(np.float32(bound) for bound in (0, 255, 0, 255)), levels)


def weight(values, dtype=np.int8):
    return op.multiply(op.convert(op.constant(values.astype(dtype)), "f32"), op.constant(np.float32(1)))


def product(x, w, name="node_product"):
    made = op.matmul(x, w, False, True)
    made.set_friendly_name(name)
    return made


def model_of(build, size=64):
    x = op.parameter([4, size], np.float32, name="x")
    return openvino.Model([build(x)], [x], "model")


def found_in(model):
    return run_ops(model, Session(model, "this model").compiled)


W = np.arange(-256, 256).reshape(8, 64) % 64


@pytest.mark.parametrize(
    ("build", "reason", "weights"),
    [
        (lambda x: product(fake_quantized(x), weight(W)), "", ""),
        (lambda x: product(x, weight(W)), "", "i8"),
        (lambda x: product(fake_quantized(x, 65536), weight(W)), "it is quantized to 16 bits", ""),
        (
            lambda x: product(
                op.multiply(op.convert(op.convert(op.round(x), "u8"), "f32"), op.reduce_max(x, np.array([0, 1]))),
                weight(W),
            ),
            "ranges that are found at run time",
            "",
        ),
    ],
    ids=["both", "weights alone", "16 bits", "run time"],
)
def test_what_runs_a_product(build, reason, weights):
    (found,) = found_in(model_of(build))
    assert (found.name, found.weights) == ("product", weights)
    assert found.layer == "FullyConnected" or "run time" in reason  # there OpenVINO moves the scale behind the product
    assert reason in found.reason
    assert bool(found.reason) == bool(reason)
    assert found.on_integers == (not reason and not weights)
    assert found.kernel.endswith("I8") == found.on_integers


def test_a_float_product_is_no_quantized_op():
    assert found_in(model_of(lambda x: product(x, op.constant(W.astype(np.float32))))) == ()


@pytest.mark.parametrize("extreme", [64, 127])
def test_sums_at_the_extremes(extreme):
    """Two products of 255 and 64 fit into 16 bits, two of 255 and 127 do not: without VNNI, they saturate."""
    model = model_of(lambda x: product(fake_quantized(x), weight(np.full((8, 64), extreme))))
    (output,) = Session(model, "this model").run([torch.full((4, 64), 255.0)])
    exact = 255.0 * extreme * 64
    if extreme == 64 or not detect(environment={}).saturates:
        assert output.max() == output.min() == exact
    else:
        assert output.max() < exact


def test_what_a_model_takes_and_bytes_that_are_none():
    x = op.parameter(openvino.PartialShape([openvino.Dimension(1, 16), 3, -1]), np.int64, name="ids")
    (found,) = tensors_taken(openvino.Model([op.convert(x, "f32")], [x], "model"))
    assert found.dtype is torch.int64
    assert found.sizes[:2] == ((1, 16), (3, 3))
    assert found.takes(torch.zeros(2, 3, 1000, dtype=torch.int64))
    for content in (b"", b"<net>", b"no model"):
        with pytest.raises(FileFormatError, match=r"a\.xml is no model that OpenVINO reads"):
            read_model(content, b"", "a.xml")


def test_inputs_that_openvino_refuses():
    session = Session(model_of(lambda x: product(x, weight(W))), "this model")
    with pytest.raises(LoweringError, match="OpenVINO refused the inputs"):
        session.run([torch.zeros(3, 3)])
