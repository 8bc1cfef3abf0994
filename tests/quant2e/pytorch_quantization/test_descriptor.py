"""Descriptors: as values and text, as specs whose graphs hold exactly their integers, and what raises."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import quant2e
from quant2e.errors import AnnotationError, CalibrationError, Quant2eError
from quant2e.observers.encodings import encode
from quant2e.pytorch_quantization import (
    QUANT_DESC_4BIT_LINEAR_WEIGHT_PER_ROW,
    QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW,
    QUANT_DESC_8BIT_PER_TENSOR,
    QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR,
    MaxCalibrator,
    QuantDescriptor,
    amax_of,
    descriptor_config,
    fake_tensor_quant,
    quantize_tensor,
    quantize_weights_in_place,
)
from quantizers import X86InductorQuantizer, XNNPACKQuantizer

EXAMPLES = [
    QuantDescriptor(),
    QuantDescriptor(4, "head", axis=0),
    QuantDescriptor(axis=(0, 2), amax=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.1]]),
    QuantDescriptor(amax=0.3, scale_amax=0.9, learn_amax=True),
    QuantDescriptor(axis=-1, amax=torch.tensor([0.1, 0.2])),
    QuantDescriptor(unsigned=True, calib_method="entropy", skip_zeros=True, num_bins=512),
    QuantDescriptor(narrow_range=True, calib_method="percentile", percentile=99.9),
]


@pytest.mark.parametrize("descriptor", EXAMPLES, ids=str)
def test_there_and_back(descriptor):
    pytest.importorskip("yaml")
    assert QuantDescriptor.from_dict(descriptor.to_dict()) == descriptor
    assert QuantDescriptor.from_yaml(descriptor.to_yaml()) == descriptor
    assert pickle.loads(pickle.dumps(descriptor)) == copy.deepcopy(descriptor) == descriptor
    assert {descriptor: 1}[QuantDescriptor.from_dict(descriptor.to_dict())] == 1


def test_texts_are_short():
    pytest.importorskip("yaml")
    assert QuantDescriptor(4, axis=0).to_yaml() == "num_bits: 4\naxis:\n- 0\n"
    assert QuantDescriptor.from_yaml("num_bits: 8\naxis: [0]\namax: [1.5, 2.5]") == QuantDescriptor(
        axis=0, amax=(1.5, 2.5)
    )
    assert QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW.to_dict() == {"num_bits": 8, "axis": [0]}


def test_without_yaml_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"quant2e\[yaml\]"):
        QuantDescriptor().to_yaml()


WRONG = [
    ({"num_bits": 1}, "num_bits=1"),
    ({"num_bits": (4, 3)}, "floats of 8 bits"),
    ({"num_bits": True}, "num_bits=True"),
    ({"axis": (0, 0)}, "different ones"),
    ({"amax": -1.0}, "magnitudes are finite"),
    ({"amax": float("nan")}, "magnitudes are finite"),
    ({"amax": [1.0, 2.0]}, "say which axis"),
    ({"axis": (0, 1), "amax": [1.0, 2.0]}, "one number for each index"),
    ({"calib_method": "median"}, "choose one of"),
    ({"scale_amax": 0.0}, "positive, finite"),
    ({"unsigned": True, "narrow_range": True}, "unsigned ones have none"),
    ({"skip_zeros": True}, "does not depend on zeros"),
    ({"calib_method": "percentile", "percentile": 0.0}, "percentage above 0"),
    ({"learn_amax": 1}, "True or False"),
    ({"num_bins": 1}, "between 2 and"),
    ({"axis": 1.5}, "axis=1.5: a number, several"),
    ({"axis": "1"}, "axis='1': a number, several"),
    ({"unsigned": "yes"}, "unsigned='yes': True or False"),
    ({"name": 3}, "name=3: text"),
    ({"amax": "1.0"}, "amax='1.0': a number"),
    ({"amax": {1.0}}, "a number, or numbers for each index"),
]


@pytest.mark.parametrize(("fields", "said"), WRONG, ids=str)
def test_what_cannot_be(fields, said):
    with pytest.raises(AnnotationError, match=said):
        QuantDescriptor(**fields)


def test_unknown_keys_name_the_nearest():
    with pytest.raises(AnnotationError, match="no 'num_bit'; did you mean 'num_bits'"):
        QuantDescriptor.from_dict({"num_bit": 8})
    with pytest.raises(AnnotationError, match="fake-quantizes"):
        QuantDescriptor.from_dict({"fake_quant": False})
    pytest.importorskip("yaml")
    with pytest.raises(AnnotationError, match="is a mapping"):
        QuantDescriptor.from_yaml("8")


@pytest.mark.parametrize("descriptor", [
    QuantDescriptor(axis=(0, 1)), QuantDescriptor(axis=-1), QuantDescriptor(20), QuantDescriptor(learn_amax=True)
], ids=str)  # fmt: skip
def test_what_no_spec_can_hold(descriptor):
    with pytest.raises(AnnotationError):
        descriptor.to_spec()


# ---------------------------------------------------------------- specs compute what the functions compute

X = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))
BITS = [(8, False, False), (8, False, True), (8, True, False), (4, False, False), (12, True, False)]
PLAIN = [
    QuantDescriptor(bits, unsigned=unsigned, narrow_range=narrow, axis=axis, scale_amax=scale)
    for bits, unsigned, narrow in BITS
    for axis in (None, 0, 1)
    for scale in (None, 0.5)
] + [
    QuantDescriptor(bits, axis=axis, unsigned=unsigned, calib_method=method, num_bins=256)
    for bits, method in [(4, "mse"), (4, "entropy"), (8, "percentile")]
    for axis, unsigned in [(None, False), (None, True), (0, False)]
]  # fmt: skip


def observer_of(descriptor, **kwargs):
    from quant2e.prepare.insert_observers import _make_plain

    return _make_plain(descriptor.to_spec(**kwargs), ["x"])


def fixed(descriptor, x):
    """The same with the amax that it finds in ``x``, known in advance."""
    from dataclasses import replace

    amax = amax_of(x, replace(descriptor, scale_amax=None)).flatten()
    return replace(descriptor, amax=float(amax) if descriptor.axis is None else amax, calib_method="max")


@pytest.mark.parametrize("descriptor", PLAIN, ids=str)
def test_observers_and_fake_quantizers_agree_with_the_functions(descriptor):
    x = X.abs() if descriptor.unsigned else X
    expected = quantize_tensor(x, descriptor)
    for each in (descriptor, fixed(descriptor, x)):
        observer = observer_of(each)
        observer(x)
        scale, zero_point = observer.calculate_qparams()
        high = each.integers[1]
        torch.testing.assert_close(scale, (amax_of(x, each) / high).flatten().reshape(scale.shape), rtol=2e-7, atol=0)
        assert int(zero_point.abs().sum()) == 0
        assert encode(observer) is not None
        fake = observer_of(each, is_qat=True)
        step = (amax_of(x, each) / high).expand_as(x)
        apart = (fake(x) - expected).abs()
        assert float((apart / step).max()) < 1.01  # a quotient next to a tie may go either way
        assert float((apart > step * 1e-3).float().mean()) < 0.05


def test_unsigned_observers_refuse_negative_values():
    observer = observer_of(QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR)
    observer(X)
    with pytest.raises(CalibrationError, match="quantize this tensor with signed integers"):
        observer.calculate_qparams()


def test_a_fixed_amax_of_other_channels_is_an_error():
    observer = observer_of(QuantDescriptor(axis=0, amax=(1.0, 2.0)))
    with pytest.raises(CalibrationError, match="amax holds 2 numbers"):
        observer(X)
    with pytest.raises(AnnotationError, match="one number"):
        quant2e.FixedAmaxObserver(amax=[1.0, 2.0], dtype=torch.int8)
    with pytest.raises(AnnotationError, match="static"):
        quant2e.FixedAmaxObserver(amax=1.0, dtype=torch.int8, is_dynamic=True)


def test_a_fixed_amax_stays_exact_in_half_precision():
    observer = observer_of(QuantDescriptor(axis=0, amax=(0.1, 0.3)))
    before = observer.calculate_qparams()[0]
    assert torch.equal(observer.half().calculate_qparams()[0], before)


def test_no_kernel_replaces_the_scale_of_an_amax():
    """torch's kernel knows PT2E's formula only."""
    options = {"dtype": torch.int8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_tensor_symmetric}
    for more in ({"from_amax": True}, {"scale_amax": 0.5}):
        fused = quant2e.FusedMovingAvgObsFakeQuantize(quant2e.MovingAverageMinMaxObserver, **options, **more)
        plain = quant2e.FakeQuantize(quant2e.MovingAverageMinMaxObserver, **options, **more)
        assert torch.equal(fused(X), plain(X))
        assert torch.equal(fused.scale, plain.scale)
    with pytest.raises(AnnotationError, match="scale_amax=-1"):
        quant2e.MinMaxObserver(scale_amax=-1.0)
    with pytest.raises(AnnotationError, match="from_amax"):
        quant2e.PerChannelMinMaxObserver(from_amax=True, qscheme=torch.per_channel_affine_float_qparams)


# ---------------------------------------------------------------- in graphs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def batches():
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(8, 10, generator=generator) for _ in range(8)]


def encodings(model):
    return [group.encoding for group in quant2e.Encodings.of(model).groups if group.encoding is not None]


@pytest.mark.parametrize("quantizer", [XNNPACKQuantizer, lambda: X86InductorQuantizer(isa="avx512_vnni")])
@pytest.mark.parametrize("bits", [8, 7])
def test_a_model_holds_the_integers_of_its_descriptors(quantizer, bits):
    torch.manual_seed(0)
    model, data = Net().eval(), batches()
    unsigned = quantizer is not XNNPACKQuantizer
    activation = QuantDescriptor(bits, calib_method="mse", unsigned=unsigned)
    weight = QuantDescriptor(bits, axis=0, narrow_range=True)
    data = [batch.abs() for batch in data] if unsigned else data
    result = quant2e.quantize(model, (data[0],), quantizer().set_global(descriptor_config(activation, weight)), data)
    weights = {name: value for name, value in result.module.state_dict().items() if value.dtype == torch.int8}
    expected = [layer.weight for layer in (model.first, model.second)]
    found = [value for value in weights.values() if value.dim() == 2]
    assert len(found) == 2
    for layer in expected:
        amax = MaxCalibrator(bits, 0)
        amax.collect(layer)
        from quant2e.pytorch_quantization import tensor_quant

        integers, _ = tensor_quant(layer.detach(), amax.compute_amax(), bits)
        assert any(value.shape == integers.shape and torch.equal(value.float(), integers) for value in found)
    assert result.report.sqnr_db > 25


def test_a_fixed_amax_reaches_the_graph():
    torch.manual_seed(0)
    model, data = Net().eval(), batches()
    config = descriptor_config(QuantDescriptor(amax=6.35), QuantDescriptor(axis=0))
    prepared = quant2e.prepare_pt2e(quant2e.capture(model, (data[0],)), XNNPACKQuantizer().set_global(config))
    quant2e.calibrate(prepared, data)
    text = quant2e.graph_text(quant2e.convert_pt2e(prepared))
    assert "0.05" in text


def test_methods_can_be_derived_again_without_data():
    torch.manual_seed(0)
    model, data = Net().eval(), batches()

    def prepared(method):
        config = descriptor_config(QuantDescriptor(calib_method=method), QuantDescriptor(axis=0))
        graph = quant2e.prepare_pt2e(quant2e.capture(model, (data[0],)), XNNPACKQuantizer().set_global(config))
        return quant2e.calibrate(graph, data)

    again = quant2e.convert_pt2e(quant2e.rederive(prepared("histogram"), method="mse"))
    assert torch.equal(again(data[0]), quant2e.convert_pt2e(prepared("mse"))(data[0]))


def test_predefined_ones():
    assert QUANT_DESC_8BIT_PER_TENSOR.to_spec().qscheme == torch.per_tensor_symmetric
    assert QUANT_DESC_8BIT_PER_TENSOR.integers == (-128, 127)
    assert QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW.to_spec().ch_axis == 0
    assert QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL.to_spec().ch_axis == 1
    assert QUANT_DESC_4BIT_LINEAR_WEIGHT_PER_ROW.integers == (-8, 7)


# ---------------------------------------------------------------- weights in place


def test_parameters_are_rounded_along_several_axes():
    conv = nn.Conv2d(4, 6, 3)
    before = conv.weight.detach().clone()
    assert quantize_weights_in_place(conv, {"weight": QuantDescriptor(4, axis=(0, 1), narrow_range=True)}) == ["weight"]
    expected = fake_tensor_quant(before, before.abs().amax((2, 3), keepdim=True), 4)
    assert torch.equal(conv.weight, expected)
    amax = before.abs().amax((2, 3))
    assert torch.equal(quantize_tensor(before, QuantDescriptor(4, axis=(0, 1), amax=amax, narrow_range=True)), expected)
    with pytest.raises(AnnotationError, match=r"give \[6, 4\] numbers"):
        quantize_tensor(before, QuantDescriptor(axis=(0, 1), amax=amax.T))


def prepared_for_training(model, data):
    config = descriptor_config(QuantDescriptor(), QuantDescriptor(4, axis=0, narrow_range=True), is_qat=True)
    graph = quant2e.capture(model, (data,))
    return quant2e.prepare_qat_pt2e(graph, XNNPACKQuantizer().set_global(config))


def test_weights_of_a_graph_in_training_are_rounded_where_its_fake_quantizers_put_them():
    torch.manual_seed(0)
    model, data = Net().train(), batches()[0]
    prepared = prepared_for_training(model, data)
    prepared(data)
    before = prepared(data)
    names = quantize_weights_in_place(prepared)
    assert sorted(names) == ["first.weight", "second.weight"]
    weight = dict(prepared.named_parameters())["first.weight"]
    assert all(len(row.unique()) <= 16 for row in weight)
    assert not torch.equal(weight, model.first.weight)
    torch.testing.assert_close(prepared(data), before)


def test_weights_with_a_norm_are_rounded_as_they_will_be_deployed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    data = torch.randn(8, 3, 6, 6)
    prepared = prepared_for_training(model.train(), data)
    for _ in range(3):
        prepared(data)
    prepared.eval()
    before = prepared(data)
    prepared.train()
    text = quant2e.graph_text(prepared)
    assert sorted(quantize_weights_in_place(prepared)) == ["0.weight", "4.weight"]
    assert quant2e.graph_text(prepared) == text
    prepared.eval()
    torch.testing.assert_close(prepared(data), before, rtol=1e-4, atol=1e-5)
    held = prepared.state_dict()["0.weight"].clone()
    assert sorted(quantize_weights_in_place(prepared)) == ["0.weight", "4.weight"]
    torch.testing.assert_close(held, prepared.state_dict()["0.weight"])


def test_fake_quantizers_of_another_library_round_and_are_switched():
    theirs = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    torch.manual_seed(0)
    model, data = Net().train(), batches()[0]
    config = theirs.get_default_x86_inductor_quantization_config(is_qat=True)
    quantizer = theirs.X86InductorQuantizer().set_global(config)
    prepared = quant2e.prepare_qat_pt2e(quant2e.capture(model, (data,)), quantizer)
    schedule = quant2e.Schedule(prepared, {0: "disable_fake_quant", 1: ("enable_fake_quant", "disable_observer")})
    schedule(0)
    torch.testing.assert_close(prepared(data), model(data))
    schedule(1)
    before = prepared(data)
    assert not torch.equal(before, model(data))
    assert sorted(quantize_weights_in_place(prepared)) == ["first.weight", "second.weight"]
    torch.testing.assert_close(prepared(data), before)


def test_what_cannot_be_rounded_raises():
    model = Net()
    with pytest.raises(Quant2eError, match="no fake-quantizers"):
        quantize_weights_in_place(model)
    with pytest.raises(Quant2eError, match="the nearest is 'first.weight'"):
        quantize_weights_in_place(model, {"frist.weight": QuantDescriptor()})
    with pytest.raises(Quant2eError, match="no pattern is given"):
        quantize_weights_in_place(model, {})
    with pytest.raises(Quant2eError, match="no weight is fake-quantized"):
        quantize_weights_in_place(quant2e.capture(model.eval(), (batches()[0],)))
