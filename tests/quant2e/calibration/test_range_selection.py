import pytest
import torch
from torch import nn

import quant2e
from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation, QuantizationSpec
from quant2e.calibration.range_selection import CANDIDATES, RangeChoice, ranges_of, select_ranges
from quant2e.calibration.statistics import measuring
from quant2e.errors import CalibrationError, CaptureError
from quant2e.observers.measuring import HistogramObserver, default_per_channel_weight_observer

linear = torch.ops.aten.linear.default


class Inputs(Quantizer):
    """Inputs of linears by histogram, in so many bits."""

    def __init__(self, bits=8, **options):
        high = 2 ** (bits - 1)
        self.act = QuantizationSpec(
            torch.int8, HistogramObserver.with_args(**options), -high, high - 1, torch.per_tensor_affine
        )
        self.weight = QuantizationSpec(
            torch.int8, default_per_channel_weight_observer, -127, 127, torch.per_channel_symmetric, ch_axis=0
        )

    def annotate(self, model):
        for node in model.graph.nodes:
            if node.target is linear:
                x, w = node.args[:2]
                node.meta[ANNOTATION] = QuantizationAnnotation(input_qspec_map={x: self.act, w: self.weight})
        return model

    def validate(self, model):
        pass


def reader(columns):
    """A linear that reads the last of 64 columns only, or all but the last."""
    layer = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 64))
        layer.weight[:, slice(0, 63) if columns == "last" else slice(63, 64)] = 0
    return layer.eval()


def outliers(n=6, seed=0):
    """Ordinary columns, and a last one in which a value out of 50 is large: squared error says "clip"."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        x = torch.randn(512, 64, generator=g)
        x[:, 63] *= 40 * (torch.rand(512, generator=g) < 0.02)
        found.append(x)
    return found


def calibrated(model, batches, **options):
    captured = quant2e.capture(model, (batches[0],))
    return quant2e.calibrate(quant2e.prepare_pt2e(captured, Inputs(**options)), batches)


def chosen(prepared):
    return [o.method for o in measuring(prepared).values() if isinstance(o, HistogramObserver)]


def output_error(model, prepared, x):
    with torch.no_grad():
        return (quant2e.convert_pt2e(prepared)(x) - model(x)).square().mean().item()


@pytest.mark.parametrize("columns", ["last", "all but last"])
def test_the_winner_has_the_smallest_output_error(columns):
    model, held = reader(columns), outliers(1, seed=9)[0]
    prepared = calibrated(model, outliers(), bits=4)
    (found,) = select_ranges(prepared, [held])
    assert chosen(prepared) == [found.winner[0]]
    measured = {}
    for method, percentile in CANDIDATES:
        measured[method] = output_error(model, quant2e.rederive(prepared, method=method, percentile=percentile), held)
    assert measured[found.winner[0]] == min(measured.values())
    assert found.errors[found.winner] == min(found.errors.values())
    if columns == "last":  # large values that matter must not be clipped
        assert found.winner[0] == "minmax"
        assert measured["minmax"] < 0.5 * measured["percentile"]


def test_an_authors_method_is_kept():
    prepared = calibrated(reader("last"), outliers(), bits=4, method="percentile")
    assert select_ranges(prepared, outliers(1)) == ()
    assert chosen(prepared) == ["percentile"]


def test_candidates_that_agree_are_not_compared():
    prepared = calibrated(reader("last"), [torch.full((4, 64), 3.0)])
    assert select_ranges(prepared, [torch.full((4, 64), 3.0)]) == ()


def test_nothing_but_the_method_changes():
    prepared = calibrated(reader("last"), outliers())
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    held = outliers(1)
    kept = held[0].clone()
    state = torch.get_rng_state()
    select_ranges(prepared, held)
    assert torch.equal(held[0], kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())


def test_range_selection_needs_data():
    with pytest.raises(CalibrationError, match="at least one held-out batch"):
        select_ranges(calibrated(reader("last"), outliers()), [])


def test_a_tensor_that_nothing_serves_is_named():
    x = torch.randn(512, 64) * 1e-3
    x[:, 63] = 100.0  # a constant that nothing reads takes all the integers

    prepared = calibrated(reader("all but last"), [x], bits=4)
    choices = select_ranges(prepared, [x])
    bad = choices or (RangeChoice("o", "the output of 'x'", dict.fromkeys(CANDIDATES, 1.0)),)
    good = RangeChoice("o", "y", {("mse", 99.99): 1e-4})
    rows = ranges_of([good, *bad])
    assert [row.tensor for row in rows] == [bad[0].tensor, "y"]
    assert rows[0].sqnr_db < 6.0 < rows[1].sqnr_db == pytest.approx(40.0)


def test_quantize_races_and_says_so():
    class Collapsing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = reader("all but last")

        def forward(self, *, x, scale):
            return self.layer(x * scale)

    x = outliers(4)
    batches = [{"scale": torch.ones(1), "x": one} for one in x]
    model = Collapsing().eval()
    result = quant2e.quantize(model, (), Inputs(bits=4), batches, kwargs={"x": x[0], "scale": torch.ones(1)})
    assert result.report.sqnr_db > 5


def test_str():
    one = RangeChoice("o", "x", {("mse", 99.99): 0.01, ("minmax", 99.99): 0.001})
    assert str(one) == "x: minmax (mse 20.0 dB, minmax 30.0 dB)"
    assert one.sqnr == pytest.approx(30)
    close = RangeChoice("o", "x", {("mse", 99.99): 0.01, ("minmax", 99.99): 0.00999})
    assert close.winner[0] == "mse"


@pytest.mark.parametrize("name", ["tuple", "tensor", "dict"])
def test_inputs_are_given_by_position_or_by_name(name):
    model, data = reader("last"), outliers(3)
    wrapped = {"tuple": lambda x: (x,), "tensor": lambda x: x, "dict": lambda x: {"input": x}}[name]
    wanted = str(select_ranges(calibrated(model, data), data[:2]))
    assert str(select_ranges(calibrated(model, data), [wrapped(x) for x in data[:2]])) == wanted
    with pytest.raises(CaptureError, match="'y' is not one of them"):
        select_ranges(calibrated(model, data), [{"y": data[0]}])
