"""Bias correction: means come back, for every kind of layer, with and without a bias, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quant2e
from quant2e.accuracy.algorithms.correct_bias import CorrectBias, correct_bias
from quant2e.accuracy.algorithms.layers.expected_shift import mean_of_clamped_normal
from quant2e.annotation.specs import QuantizationAnnotation, QuantizationSpec
from quant2e.errors import Quant2eError
from quant2e.observers.measuring import MinMaxObserver
from quant2e.pipeline import quantize
from quant2e.quantized_model import load
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.quant2e.annotators import ACT, DYNAMIC, Annotate, on, products

aten = torch.ops.aten
COARSE = QuantizationSpec(torch.int8, MinMaxObserver, -4, 3, torch.per_tensor_symmetric)
"""Three bits with one scale: rounding shifts means by much."""


def batches(*shape, count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(*shape, generator=generator) + 0.5 for _ in range(count)]


def prepared(model, data, quantizer):
    captured = quant2e.capture(model, data[0])
    made = quant2e.prepare_pt2e(captured, quantizer)
    return captured, quant2e.calibrate(made, data)


def mean_error(captured, converted, data, axis):
    """The mean of the error of each channel, over the deviation of the output."""
    errors = torch.cat([(converted(x) - captured(x)).movedim(axis, 0).flatten(1) for x in data], 1)
    return errors.mean(1).abs().max() / torch.cat([captured(x).flatten() for x in data]).std()


LAYERS = {
    "conv1d": (lambda bias: nn.Conv1d(3, 4, 3, bias=bias), (8, 3, 12), 1),
    "conv1d, same": (lambda bias: nn.Conv1d(3, 4, 3, padding="same", bias=bias), (8, 3, 12), 1),
    "conv2d": (lambda bias: nn.Conv2d(3, 4, 3, bias=bias), (8, 3, 7, 7), 1),
    "conv2d, depthwise": (lambda bias: nn.Conv2d(4, 4, 3, groups=4, bias=bias), (8, 4, 7, 7), 1),
    "conv2d, one image": (lambda bias: nn.Conv2d(3, 4, 3, bias=bias), (3, 7, 7), 0),
    "conv3d": (lambda bias: nn.Conv3d(2, 4, 2, bias=bias), (4, 2, 4, 4, 4), 1),
    "conv_transpose1d": (lambda bias: nn.ConvTranspose1d(3, 4, 3, stride=2, bias=bias), (8, 3, 6), 1),
    "conv_transpose2d": (lambda bias: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias), (8, 4, 5, 5), 1),
    "conv_transpose3d": (lambda bias: nn.ConvTranspose3d(2, 4, 2, bias=bias), (4, 2, 3, 3, 3), 1),
    "linear": (lambda bias: nn.Linear(6, 5, bias=bias), (32, 6), 1),
    "linear, tokens": (lambda bias: nn.Linear(6, 5, bias=bias), (8, 4, 6), 2),
}
OPS = (
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv3d.default, aten.linear.default,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip
KINDS = {"static": ACT, "dynamic": DYNAMIC, "weight-only": None}


def coarse(act=ACT):
    def note(node):
        if node.target not in OPS:
            return None
        specs = {node.args[0]: act, node.args[1]: COARSE}
        return QuantizationAnnotation({k: v for k, v in specs.items() if v is not None}, None, rule="product")

    return Annotate(note)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_of_each_channel_comes_back(name, bias):
    make, shape, axis = LAYERS[name]
    torch.manual_seed(0)
    model, data = make(bias).eval(), batches(*shape)
    captured, graph = prepared(model, data, coarse())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = mean_error(captured, quant2e.convert_pt2e(graph), data, axis)
    corrected = correct_bias(graph, data)
    assert mean_error(captured, quant2e.convert_pt2e(corrected), data, axis) < 1e-4 < plain
    (step,) = quant2e.report_of(corrected).algorithms
    assert len(step.changes) == 1
    assert ("a bias is added" in step.changes[0]) is not bias
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert quant2e.report_of(graph).algorithms == ()
    if not any(word in name for word in ("3d", "same", "transpose2d")):  # borders are not in the formula
        computed = correct_bias(graph, data, method="analytic")
        assert mean_error(captured, quant2e.convert_pt2e(computed), data, axis) < plain / 3


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_quantization(kind):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5, bias=False)).eval(), batches(32, 6)
    captured, graph = prepared(model, data, coarse(KINDS[kind]))
    plain = mean_error(captured, quant2e.convert_pt2e(graph), data, 1)
    corrected = correct_bias(graph, data)
    assert mean_error(captured, quant2e.convert_pt2e(corrected), data, 1) < 1e-4 < plain
    result = quantize(model, data[0], coarse(KINDS[kind]), data, algorithms=["correct_bias"], min_sqnr_db=None)
    (step,) = result.report.algorithms
    assert (step.outcome, len(step.changes)) == ("kept", 2)
    assert step.after_db > step.before_db + 3


class Products(nn.Module):
    """Products with a constant that have no bias of their own."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.w, self.b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        match self.form:
            case "matmul and add":
                return self.b + x @ self.w
            case "mm and add":
                return torch.mm(x, self.w) + self.b
            case "addmm":
                return torch.addmm(self.b, x, self.w)
            case "addmm, scaled":
                return torch.addmm(self.b, x, self.w, alpha=2)
            case _:
                return torch.relu(x @ self.w)


REACHES = ("matmul and add", "mm and add", "addmm")


@pytest.mark.parametrize("form", [*REACHES, "addmm, scaled", "matmul alone"])
def test_products_that_are_spelled_out(form):
    torch.manual_seed(0)
    model, data = Products(form).eval(), batches(32, 6)
    target, inputs = aten.matmul.default, [ACT, COARSE]
    if form.startswith("addmm"):
        target, inputs = aten.addmm.default, [None, ACT, COARSE]
    elif form.startswith("mm"):
        target = aten.mm.default
    captured, graph = prepared(model, data, on(target, inputs))
    plain = mean_error(captured, quant2e.convert_pt2e(graph), data, 1)
    corrected = correct_bias(graph, data)
    after = mean_error(captured, quant2e.convert_pt2e(corrected), data, 1)
    if form in REACHES:
        assert after < 1e-4 < plain
    else:
        assert after == plain


def test_biases_and_weights_that_are_shared_are_corrected_for_each_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return self.linear(torch.relu(self.linear(x)))

    torch.manual_seed(0)
    model, data = Twice().eval(), batches(32, 6)
    config = get_symmetric_quantization_config(weight_qmin=-4, weight_qmax=3)
    for quantizer in (coarse(), XNNPACKQuantizer().set_global(config)):
        captured, graph = prepared(model, data, quantizer)
        corrected = correct_bias(graph, data)
        converted = quant2e.convert_pt2e(corrected)
        plain = mean_error(captured, quant2e.convert_pt2e(graph), data, 1)
        assert mean_error(captured, converted, data, 1) < plain / 5
        names = {str(n.target) for n in corrected.graph.nodes if n.op == "get_attr" and "bias" in str(n.target)}
        assert len(names) == 2


def depthwise():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6()]
    for _ in range(2):
        layers += [nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1)]
        layers += [nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).train()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2.0)
                module.bias.uniform_(-0.5, 1.0)
                module.momentum = None
        for x in batches(16, 3, 14, 14, count=8):
            net((x - 1.0) * 3.0)
    return net.eval(), [(x - 1.0) * 3.0 for x in batches(16, 3, 14, 14)]


def test_a_depthwise_net_without_data_from_its_norms():
    """Section 4.2 of Nagel et al.: weights of few bits shift means, and the norms know the means of the inputs."""
    model, data = depthwise()
    captured, graph = prepared(model, data, products(None, COARSE, None))
    plain = mean_error(captured, quant2e.convert_pt2e(graph), data, 1)
    free = mean_error(captured, quant2e.convert_pt2e(correct_bias(graph, method="analytic")), data, 1)
    measured = mean_error(captured, quant2e.convert_pt2e(correct_bias(graph, data)), data, 1)
    assert free < plain / 2
    assert measured < 1e-4
    (step,) = quant2e.report_of(correct_bias(graph, method="analytic")).algorithms
    assert "nothing is known of the mean of the input" in step.changes[-1]


def test_what_is_corrected_is_saved_and_compared(tmp_path):
    model, data = depthwise()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    result = quantize(model, data[0], quantizer, data, algorithms=["correct_bias"], min_sqnr_db=None)
    (step,) = result.report.algorithms
    assert step.outcome == "kept"
    result.save(tmp_path / "m.pt2")
    assert torch.equal(load(tmp_path / "m.pt2")(data[0]), result(data[0]))
    captured, graph = prepared(model, data, quantizer)
    corrected = correct_bias(graph, data)
    assert quant2e.compare(corrected, quant2e.convert_pt2e(corrected), data).rows
    assert quant2e.to_integer(quant2e.convert_pt2e(corrected))(data[0]).shape == (16, 5)


@given(st.floats(-3, 3), st.floats(0.01, 3), st.floats(-2, 1), st.floats(0, 3))
@settings(max_examples=25, deadline=None)
def test_the_mean_of_a_clamped_normal(mean, deviation, low, width):
    points = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    weights = torch.exp(-0.5 * points.square())
    exact = ((mean + deviation * points).clamp(low, low + width) * weights).sum() / weights.sum()
    found = mean_of_clamped_normal(torch.tensor([mean]), torch.tensor([deviation]), low, low + width)
    assert abs(float(found) - float(exact)) < 1e-4


REFUSED = [
    (correct_bias, "correct_bias measures on data"),
    (lambda graph: correct_bias(graph, [torch.rand(2, 6)], method="both"), "neither 'sequential' nor 'analytic'"),
    (lambda graph: correct_bias(graph, [torch.rand(2, 6)], samples=0), "no whole number above 0"),
    (lambda graph: correct_bias(graph, []), "held no batch"),
    (lambda graph: correct_bias(graph, torch.rand(2, 6)), "wrap a single batch in a list"),
    (lambda graph: correct_bias(quant2e.convert_pt2e(graph), [torch.rand(2, 6)]), "no observers"),
]


@pytest.mark.parametrize(("call", "said"), REFUSED)
def test_refused(call, said):
    graph = prepared(nn.Linear(6, 5).eval(), batches(32, 6), coarse())[1]
    with pytest.raises(Quant2eError, match=said):
        call(graph)


def test_only_as_many_samples_are_read_as_are_asked_for():
    def endless():
        while True:
            yield torch.rand(32, 6)

    graph = prepared(nn.Linear(6, 5).eval(), batches(32, 6), coarse())[1]
    assert quant2e.report_of(correct_bias(graph, endless(), samples=33)).algorithms[0].changes
    assert CorrectBias(samples=33).samples == 33
