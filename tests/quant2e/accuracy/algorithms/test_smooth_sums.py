"""Smoothed sums: the float result stays, the range shrinks, other sums are left, and what it is worth."""

import torch
from torch import nn

import quant2e
from quant2e.accuracy.algorithms.smooth_sums import smooth_sums
from quant2e.accuracy.output_error import output_sqnr
from quant2e.graph.captured.calls import Call
from quantizers import X86InductorQuantizer, XNNPACKQuantizer, get_symmetric_quantization_config


class PostNorm(nn.Module):
    """Two layers of BERT's form; one channel of each sum is a few hundred times as large as the others."""

    def __init__(self, outlier=200.0, bias=True):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=bias) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.dropout = nn.Dropout(0.1)
        with torch.no_grad():
            for layer, norm in zip(self.layers, self.norms, strict=True):
                layer.weight[3] *= outlier
                norm.weight.fill_(50.0)
                norm.weight[3] = 0.1

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(x + self.dropout(layer(x)))
        return x


def _quantizer():
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def _model(**settings):
    torch.manual_seed(0)
    return PostNorm(**settings).eval(), [torch.randn(8, 5, 16) for _ in range(4)]


def _sqnr(captured, reference, data):
    prepared = quant2e.prepare_pt2e(captured, _quantizer())
    quant2e.calibrate(prepared, data)
    return output_sqnr(reference, quant2e.convert_pt2e(prepared), [Call((data[0],), {})])


def test_the_float_result_stays_bit_for_bit_and_the_quantized_one_gains_ten_decibels():
    model, data = _model()
    captured = quant2e.capture(model, (data[0],))
    before = str(captured.graph)
    smoothed = smooth_sums(captured, _quantizer(), data)
    assert str(captured.graph) == before
    assert torch.equal(smoothed(data[0]), captured(data[0]))
    assert _sqnr(smoothed, model, data) > _sqnr(captured, model, data) + 10


def test_without_a_bias_too():
    model, data = _model(bias=False)
    captured = quant2e.capture(model, (data[0],))
    assert torch.equal(smooth_sums(captured, _quantizer(), data)(data[0]), captured(data[0]))


def test_even_sums_and_sums_that_stay_float_are_left_as_they_are():
    model, data = _model(outlier=1.0)
    captured = quant2e.capture(model, (data[0],))
    assert str(smooth_sums(captured, _quantizer(), data).graph) == str(captured.graph)
    model, data = _model()
    captured = quant2e.capture(model, (data[0],))
    weights_only = X86InductorQuantizer().set_global("w8")
    assert str(smooth_sums(captured, weights_only, data).graph) == str(captured.graph)


def test_in_one_call_it_is_a_step_that_is_kept_and_told():
    model, data = _model()
    result = quant2e.quantize(model, (data[0],), _quantizer(), data, algorithms=["smooth_sums"], min_sqnr_db=None)
    (step,) = result.report.algorithms
    assert step.outcome == "kept"
    assert len(step.changes) == 2
    assert "of 16 channels, a range" in step.changes[0]
