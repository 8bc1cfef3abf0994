"""Activation ranges by the loss of the output: what calibration clips comes back where the output rests on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from quant2e.accuracy.algorithms import fit_activation_ranges
from quant2e.accuracy.algorithms.fit_activation_ranges import FittedActivationRanges
from quant2e.accuracy.output_error import output_sqnr
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.observers.base import is_observer_call
from quant2e.observers.encodings import PerTensorEncoding, encode
from quant2e.observers.measuring import HistogramObserver
from quantizers import X86InductorQuantizer, XNNPACKQuantizer, recipe
from tests.quant2e.accuracy.algorithms.rounded import check_conversion, guest

CLIPS = recipe("w8a8", activation={"observer": HistogramObserver.with_args(method="percentile", percentile=99.0)})
"""Ranges that leave out one value in a hundred."""

QUANTIZERS = {
    "xnnpack": lambda: XNNPACKQuantizer().set_global(CLIPS),
    "x86 without VNNI": lambda: X86InductorQuantizer("avx2").set_global(CLIPS),
    "x86 with VNNI": lambda: X86InductorQuantizer("avx512_vnni").set_global(CLIPS),
}


class RestsOnLargeValues(nn.Module):
    """Two layers, and then a power that makes of their few large results nearly all of the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.copy_(torch.eye(8) + 0.05 * torch.randn(8, 8))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) / 40) * 40) ** 5


def batches(count=6, rows=256, tail=0.5):
    """With long tails."""
    generator = torch.Generator().manual_seed(3)
    normal = [torch.randn(2, rows, 8, generator=generator) for _ in range(count)]
    return [x * torch.exp(tail * y) for x, y in normal]


def calibrated(quantizer, model=None, data=None):
    model, data = model or RestsOnLargeValues().eval(), data or batches()
    captured = quant2e.capture(model, (data[0],))
    prepared = quant2e.prepare_pt2e(captured, quantizer)
    quant2e.calibrate(prepared, data)
    return captured, prepared


def encodings(prepared):
    calls = [node for node in prepared.graph.nodes if is_observer_call(node)]
    found = {str(call.target): encode(prepared.get_submodule(str(call.target))) for call in calls}
    return {name: one for name, one in found.items() if isinstance(one, PerTensorEncoding)}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_output_gains_and_the_float_result_stays(name):
    captured, before = calibrated(QUANTIZERS[name]())
    was = encodings(before)
    after = fit_activation_ranges(before, batches())
    assert encodings(before) == was
    now = encodings(after)
    assert {one: (e.zero_point, e.quant_min, e.quant_max) for one, e in now.items()} == {
        one: (e.zero_point, e.quant_min, e.quant_max) for one, e in was.items()
    }
    x = batches(8)[7]
    torch.testing.assert_close(after(x), before(x), rtol=0, atol=0)
    plain, mended = (output_sqnr(captured, quant2e.convert_pt2e(graph), [x]) for graph in (before, after))
    assert mended > plain + 6.0
    lines = [note for note in quant2e.report_of(after).notes if note.startswith("fit_activation_ranges: ")]
    assert lines
    assert all("× the calibrated range" in line for line in lines)
    assert len(lines) == sum(now[one].scale != was[one].scale for one in was)


@pytest.mark.slow
def test_a_guests_observers_take_part():
    _, before = calibrated(guest(), data=batches(tail=1.3))
    after = fit_activation_ranges(before, batches(tail=1.3))
    was, now = encodings(before), encodings(after)
    changed = [now[name].scale / one.scale for name, one in was.items() if now[name] != one]
    told = [note for note in quant2e.report_of(after).notes if "× the calibrated range" in note]
    assert changed
    assert len(told) == len(changed)
    assert all(any(f" {factor:.2f} ×" in note for note in told) for factor in changed)
    check_conversion(before, after, batches(8, tail=1.3)[7])


def test_ranges_grow_no_further_than_the_data():
    _, before = calibrated(QUANTIZERS["x86 with VNNI"]())
    for name, one in encodings(fit_activation_ranges(before, batches())).items():
        inner = before.get_submodule(name)
        span = float(inner.max_val - inner.min_val)
        assert (one.quant_max - one.quant_min) * one.scale <= 1.2 * 2 * span


def test_what_was_given_stays():
    scale = 0.05
    given = quant2e.FixedQParamsQuantizationSpec(
        dtype=torch.uint8, scale=scale, zero_point=128, quant_min=0, quant_max=255
    )

    class Fixed(quant2e.Quantizer):
        def annotate(self, model):
            for node in model.graph.nodes:
                if node.target is torch.ops.aten.linear.default:
                    node.meta["quantization_annotation"] = quant2e.QuantizationAnnotation(
                        input_qspec_map={node.args[0]: given}, _annotated=True
                    )
            return model

        def validate(self, model):
            pass

    _, before = calibrated(Fixed())
    after = fit_activation_ranges(before, batches())
    assert {round(one.scale, 6) for one in encodings(after).values()} == {scale}
    assert "fit_activation_ranges: there was nothing to change" in quant2e.report_of(after).notes


def test_dynamic_ranges_are_left_alone():
    _, before = calibrated(X86InductorQuantizer("avx2").set_global("w8a8-dynamic"))
    after = fit_activation_ranges(before, batches())
    assert "fit_activation_ranges: there was nothing to change" in quant2e.report_of(after).notes


def test_in_one_call_it_is_kept_where_it_helps():
    model = RestsOnLargeValues().eval()
    result = quant2e.quantize(
        model,
        (batches()[0],),
        QUANTIZERS["x86 with VNNI"](),
        batches(12),
        algorithms=["fit_activation_ranges"],
        min_sqnr_db=None,
    )
    (step,) = result.report.algorithms
    assert (step.name, step.outcome) == ("fit_activation_ranges", "kept")
    assert step.after_db > step.before_db


def test_refusals():
    _, before = calibrated(QUANTIZERS["xnnpack"]())
    with pytest.raises(Quant2eError, match="batches=0"):
        FittedActivationRanges(0)
    with pytest.raises(CalibrationError, match="at least one batch"):
        fit_activation_ranges(before, [])
    with pytest.raises(Quant2eError, match="fit_activation_ranges takes a graph that prepare_pt2e returned"):
        fit_activation_ranges(RestsOnLargeValues(), batches())

    class Index(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x).argmax(1)

    _, indices = calibrated(QUANTIZERS["xnnpack"](), Index().eval())
    with pytest.raises(Quant2eError, match="no float output"):
        fit_activation_ranges(indices, batches())
