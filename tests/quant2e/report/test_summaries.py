"""What a console and a notebook show: a few lines, whatever the size of the model."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from quant2e import (
    CapturedModule,
    Quant2eError,
    RangeChoice,
    Statistics,
    calibrate,
    capture,
    convert_pt2e,
    graph_text,
    integer_report,
    load,
    plan_of,
    prepare_pt2e,
    quantize,
    report_of,
    to_integer,
)
from quant2e.report.summary import summary
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Many channels, many layers, and an op that no rule covers: its report has all there is to shorten."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.Sequential(nn.Conv2d(3, 64, 1), *(nn.Conv2d(64, 64, 1) for _ in range(20)))

    def forward(self, x):
        return torch.cumsum(self.convolutions(x), 1)


def quantizer():
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


@pytest.fixture(scope="module")
def result():
    return quantize(Net(), (IMAGES,), quantizer(), [IMAGES] * 3)


@pytest.fixture(scope="module")
def prepared():
    return calibrate(prepare_pt2e(capture(Net(), (IMAGES,)), quantizer()), [IMAGES])


def test_a_result_and_its_report_fit_a_screen(result, golden):
    # the instruction set and the threads of the machine move the last digit
    golden("reports/short/quantized_model", re.sub(r"[\d.]+ dB", "… dB", repr(result)))
    assert repr(result.report) == repr(result).replace("QuantizedModel, quantized by XNNPACKQuantizer", "Report")
    assert len(str(result.report).splitlines()) > 20  # the whole report is as long as ever


def test_html_is_the_summary_and_a_table_of_verdicts(result):
    html = result._repr_html_()
    assert html.count("<tr>") == 1 + len(result.report.verdicts)
    assert re.sub(r"<[^>]*>", "", html.partition("</caption>")[0]) == repr(result).replace(">", "&gt;")
    assert ">convolutions.0<" in html
    sly = replace(result.report, notes=("<script>alert(1)</script>",))
    assert "<script>" not in sly._repr_html_()


def test_tables_of_numbers_are_counted(result, prepared):
    assert repr(result.encodings) == (
        "Encodings by XNNPACKQuantizer: 64 groups of points: 22 per_tensor, 21 per_channel, 21 on_grid"
    )
    shapes = {re.sub(r"-?\d[\d.e-]*", "0", repr(group)) for group in result.encodings.groups if "weight" in repr(group)}
    assert all("per_channel, dtype int0, axis 0, scale 0" in shape for shape in shapes), shapes
    assert max(len(repr(group)) for group in result.encodings.groups) < 200
    assert repr(Statistics.of(prepared, 1)) == "Statistics of 22 activations over 1 batch, and of 21 constants"
    choice = RangeChoice("activation_post_process_0", "x", {("mse", 99.99): 0.1, ("minmax", 99.99): 0.01})
    assert repr(choice) == "RangeChoice(x: minmax (mse 10.0 dB, minmax 20.0 dB))"


def test_a_captured_module_prints_as_what_it_is_and_how_large(prepared):
    captured = capture(Net(), (IMAGES,))
    assert repr(captured) == f"CapturedModule, captured: {len(captured.graph.nodes)} nodes, 0 observers"
    assert repr(prepared).splitlines() == [
        f"CapturedModule, prepared: {len(prepared.graph.nodes)} nodes, 64 observers",
        "  22 HistogramObserver",
        "  21 PerChannelMinMaxObserver",
        "  21 DerivedObserver",
    ]
    converted = convert_pt2e(prepared)
    assert repr(converted) == f"CapturedModule, converted: {len(converted.graph.nodes)} nodes, 0 observers"
    assert "def forward" in str(prepared)


def test_an_integer_report_is_counted_too(prepared):
    report = integer_report(to_integer(convert_pt2e(prepared)))
    assert repr(report).splitlines()[0] == "IntegerReport: " + str(report).splitlines()[0]
    assert len(repr(report).splitlines()) < 10
    assert report._repr_html_().count("<tr>") == 1 + len(report.verdicts)


@pytest.mark.parametrize(("count", "last"), [(0, "two"), (6, "note: 5"), (7, "… 1 more note"), (40, "… 34 more notes")])
def test_so_many_notes_are_shown(count, last):
    lines = summary(["one", "two"], [str(number) for number in range(count)]).splitlines()
    assert lines[:2] == ["one", "  two"]
    assert lines[-1] == f"  {last}"
    assert len(lines) <= 9


def test_plan_and_report_travel_with_the_graph(prepared, result, tmp_path):
    converted = convert_pt2e(prepared)
    assert isinstance(converted, CapturedModule)
    assert plan_of(converted) == plan_of(prepared)
    assert report_of(converted).verdicts == report_of(prepared).verdicts == result.report.verdicts
    assert report_of(prepared).quantized_bytes is None
    assert report_of(converted).quantized_bytes == result.report.quantized_bytes
    assert report_of(result.module) == result.report
    assert graph_text(converted) == graph_text(converted.graph)
    result.save(tmp_path / "net.pt2")
    again = load(tmp_path / "net.pt2")
    assert repr(again) == repr(result)
    with pytest.raises(Quant2eError, match="nothing on record"):
        report_of(again.module)
