"""Least squared error for the ranges of weights: smaller errors, of the kind that was asked for, in every quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from quant2e.accuracy.algorithms.fit_weight_ranges import FittedWeightRanges, fit_weight_ranges
from quant2e.accuracy.output_error import output_sqnr
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.graph.constants import evaluate
from quant2e.observers.base import is_observer_call
from quant2e.observers.encodings import encode
from quant2e.observers.given import constant_of, parameters_along
from quant2e.observers.placeholder import FixedQParamsObserver
from quantizers.x86 import X86InductorQuantizer
from tests.quant2e.accuracy.algorithms.rounded import QUANTIZERS, Small, check_conversion, ids, prepared, weights_only


def errors(graph) -> dict[str, float]:
    """The squared error of every weight with an encoding."""
    found = {}
    for call in graph.graph.nodes:
        if is_observer_call(call) and call.all_input_nodes[0].op == "get_attr":
            observer, w = graph.get_submodule(str(call.target)), evaluate(graph, call.all_input_nodes[0])
            if w.dim() < 2:
                continue
            encoding = encode(observer)
            scale, zero = parameters_along(encoding, w)
            q = (torch.round(constant_of(graph, call) * (1 / scale)) + zero).clamp(
                encoding.quant_min, encoding.quant_max
            )
            found[call.name] = float(((q - zero) * scale - w).square().sum())
    return found


@pytest.mark.parametrize(
    "name", [n if n != "torchao's x86" else pytest.param(n, marks=pytest.mark.slow) for n in QUANTIZERS]
)
@pytest.mark.parametrize("by_inputs", [False, True])
def test_errors_are_smaller_and_converted_as_they_are(name, by_inputs):
    before = prepared(QUANTIZERS[name]())
    after = fit_weight_ranges(before, ids(3), by_inputs=by_inputs)
    check_conversion(before, after, ids(1, 5)[0])
    was, now = errors(before), errors(after)
    assert was.keys() == now.keys()
    if not by_inputs:
        assert all(now[call] <= was[call] * 1.0001 for call in was)
    assert sum(now.values()) < sum(was.values()) or by_inputs
    assert any("of the squared error is left" in note for note in quant2e.report_of(after).notes)


def zero_points(graph) -> list[torch.Tensor]:
    return [m.zero_point for m in graph.modules() if isinstance(m, FixedQParamsObserver)]


class Shifted(nn.Module):
    """A weight far from symmetric, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 16), nn.Linear(16, 32)
        with torch.no_grad():
            self.one.weight.copy_(torch.rand(16, 32))
            self.two.weight.copy_(torch.where(torch.rand(32, 16) < 0.5, -1.0, 1.0) * (1 + torch.rand(32, 16) / 50))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def test_zero_points_only_where_asked_and_better():
    data = [torch.randn(8, 32) for _ in range(2)]
    before = prepared(weights_only(quant2e.observers.measuring.PerChannelMinMaxObserver), Shifted(), data)
    symmetric = fit_weight_ranges(before)
    assert not any(bool(zero.any()) for zero in zero_points(symmetric))
    free = fit_weight_ranges(before, zero_points="where_better")
    check_conversion(before, free, data[0])
    used = [bool(zero.any()) for zero in zero_points(free)]
    assert used == [True, False]
    assert sum(errors(free).values()) < 0.6 * sum(errors(symmetric).values())
    assert any("with zero points" in note for note in quant2e.report_of(free).notes)


def test_weights_of_large_inputs_count_more():
    torch.manual_seed(0)
    model = nn.Linear(64, 32).eval()
    data = [torch.randn(32, 64) * torch.logspace(1, -2, 64) for _ in range(4)]
    before = prepared(X86InductorQuantizer().set_global("w4"), model, data)
    plain, weighted = (fit_weight_ranges(before, data, by_inputs=flag) for flag in (False, True))
    found = [output_sqnr(model, quant2e.convert_pt2e(graph), data) for graph in (before, plain, weighted)]
    assert found[2] > found[1] > found[0]


def test_bad_input_is_refused():
    before = prepared(X86InductorQuantizer().set_global("w4-g32"))
    with pytest.raises(CalibrationError, match="at least one batch"):
        fit_weight_ranges(before, by_inputs=True)
    with pytest.raises(Quant2eError, match="zero_points='always'"):
        FittedWeightRanges(zero_points="always")
    with pytest.raises(Quant2eError, match="prepare_pt2e"):
        fit_weight_ranges(Small())


def test_in_one_call():
    quantizer = X86InductorQuantizer().set_global("w4-g32")
    result = quant2e.quantize(Small().eval(), (ids(1)[0],), quantizer, ids(12), algorithms=["fit_weight_ranges"])
    assert [step.name for step in result.report.algorithms] == ["fit_weight_ranges"]
