"""16-bit activations and 8-bit weights: graph, integer form, files, and what each target says."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowering
from quant2e import (
    AnnotationError,
    LoweringError,
    capture,
    convert_pt2e,
    load,
    prepare_qat_pt2e,
    quantize,
    to_integer,
)
from quant2e.integer import integer_report
from quantizers import (
    Int16Quantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_int16_quantization_config,
    get_symmetric_quantization_config,
    recipe,
)

IMAGE = (torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)


class Net(nn.Module):
    """Convolutions, a residual, a pool, attention over the pixels, a joint, a mean and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.q, self.k, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.max_pool2d(x + self.b(x), 2).flatten(2).transpose(1, 2)
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) * 0.3, -1)
        return self.head(torch.cat([weights @ x, x], 1).mean(1))


def sqnr_db(expected, found):
    signal, noise = expected.detach().square().sum(), (expected - found).detach().square().sum()
    return float(10 * torch.log10(signal / noise.clamp_min(1e-30)))


def quantized(given="a16w8", quantizer=Int16Quantizer):
    return quantize(Net().eval(), IMAGE, quantizer().set_global(given), [IMAGE], min_sqnr_db=None)


def last_step(result):
    (group,) = [g for g in result.encodings.groups if "linear_2" in g.points]
    assert (group.dtype, group.quant_min, group.quant_max, group.zero_point) == ("int16", -32768, 32767, (0,))
    return group.scale[0]


def test_only_the_weights_are_felt():
    """As good as a model whose weights are rounded and whose activations are not."""
    exact, result = Net().eval(), quantized()
    kinds = {v.op.name: v.kind for v in result.report.verdicts}
    assert [name for name, kind in kinds.items() if kind != "static"] == ["softmax"]
    rounded = Net().eval()
    for layer in (rounded.a, rounded.b, rounded.q, rounded.k, rounded.head):
        scale = layer.weight.detach().flatten(1).abs().amax(1) / 127
        scale = scale.reshape(-1, *(1,) * (layer.weight.dim() - 1))
        layer.weight.data = (layer.weight / scale).round().clamp(-127, 127) * scale
    with torch.no_grad():
        expected = exact(*IMAGE)
        assert sqnr_db(rounded(*IMAGE), result(*IMAGE)) > 65
        assert sqnr_db(expected, result(*IMAGE)) > 40
        assert sqnr_db(expected, result(*IMAGE)) > sqnr_db(expected, quantized("w8a8", XNNPACKQuantizer)(*IMAGE)) + 2


def test_integers_files_and_onnx_agree(tmp_path):
    result = quantized()
    step = last_step(result)
    result.save(tmp_path / "m.pt2")
    assert torch.equal(load(tmp_path / "m.pt2")(*IMAGE), result(*IMAGE))
    integers = to_integer(result.module)
    assert [v.name for v in integer_report(integers).verdicts if not v.integer] == ["softmax"]
    assert float((integers(*IMAGE) - result(*IMAGE)).abs().max()) <= 1.01 * step
    program = lowering.to_onnx(result, path=tmp_path / "m.onnx")
    assert program.report.verification.max_steps <= 1
    with pytest.raises(LoweringError, match="16 bits from opset 21 on, not in 20"):
        lowering.to_onnx(result, path=tmp_path / "old.onnx", opset=20)


def test_sums_beyond_32_bits_are_exact():
    torch.manual_seed(0)
    model, x = nn.Linear(4096, 3).eval(), torch.ones(2, 4096)
    nn.init.ones_(model.weight)
    nn.init.constant_(model.bias, 40.0)  # 40 / (s_x · s_w) is far beyond int32 as well
    x[1] = -1
    result = quantize(model, (x,), Int16Quantizer().set_global("a16w8"), [(x,)], min_sqnr_db=None)
    gm = to_integer(result.module, strict=True)
    (verdict,) = integer_report(gm).verdicts
    assert verdict.reason == "linear, int64 accumulator (int32 could overflow)"
    assert float((gm(x) - result(x)).abs().max()) <= 4136 / 32767
    assert sqnr_db(model(x), gm(x)) > 60


def test_training():
    prepared = prepare_qat_pt2e(capture(Net().train(), IMAGE), Int16Quantizer().set_global("a16w8-qat"))
    prepared(*IMAGE).square().mean().backward()
    prepared.eval()
    expected, found = prepared(*IMAGE), convert_pt2e(prepared)(*IMAGE)
    assert sqnr_db(expected, found) > 65  # ties of 16 bits: float noise settles some of them


def test_executorch_has_no_such_kernels_and_says_so():
    with pytest.raises(LoweringError, match=r"is int16; XNNPACK takes int8"):
        lowering.to_executorch(quantized())


@pytest.mark.slow
def test_executorchs_own_kernels_compute_in_float():
    assert lowering.to_executorch(quantized(), partitioners=[]).report.verification.max_steps <= 1


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor_computes_in_float_and_says_so():
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    result = quantize(model, (x,), Int16Quantizer().set_global("a16w8"), [(x,)], min_sqnr_db=None)
    program = lowering.to_inductor(result)
    assert "16" in str(program.report)
    assert program.report.verification.max_steps <= 1


@pytest.mark.parametrize(
    ("quantizer", "given", "message"),
    [
        (XNNPACKQuantizer, "a16w8", "torch.int8 only; Int16Quantizer quantizes activations to 16 bits"),
        (X86InductorQuantizer, "a16w8", "torch.uint8; Int16Quantizer quantizes activations to 16 bits"),
        (Int16Quantizer, "w8a8-dynamic", "know int8 and uint8.* It runs 'a16w8', 'a16w8-qat'"),
        (Int16Quantizer, "w8", "leave the activations out|weight-only|activations are None"),
        (Int16Quantizer, recipe("a16w8", activation={"symmetric": False}), "torch.per_tensor_affine; here they are"),
        (Int16Quantizer, "a16w8-asym", "weights are symmetric torch.int8"),
        (Int16Quantizer, "a16w4-g32", "one scale per output channel at most"),
        (Int16Quantizer, get_symmetric_quantization_config(), "torch.int8, torch.per_tensor_affine; here they are"),
    ],
)
def test_what_each_quantizer_refuses(quantizer, given, message):
    with pytest.raises(AnnotationError, match=message):
        quantizer().set_global(given)


def test_by_name_and_by_configuration():
    for given, is_qat in (("a16w8", False), ("a16w8-qat", True)):
        named = Int16Quantizer().set_global(given).configs()
        assert named == Int16Quantizer().set_global(get_int16_quantization_config(is_qat)).configs()
    assert Int16Quantizer.get_supported_quantization_configs() == [
        get_int16_quantization_config(False),
        get_int16_quantization_config(True),
    ]
