"""The worst tensors of a report: their SQNR against data that is really rounded, their histograms, and bounds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from quant2e import calibrate, capture, convert_pt2e, prepare_pt2e, report_of
from quant2e.convert.worst_tensors import tensor_range
from quant2e.observers.encodings import PerTensorEncoding
from quant2e.page.section import FlowChart
from quant2e.ranges.histogram import Histogram
from quant2e.report.report import Report
from quant2e.report.tensor_range import BINS, MOST_TENSORS, TensorRange
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config


def encoding(low, high):
    scale = (high - low) / 255
    return PerTensorEncoding(
        scale=scale, zero_point=round(-low / scale) - 128, quant_min=-128, quant_max=127, dtype=torch.int8
    )


def state_of(x):
    histogram = Histogram()
    return histogram.update(histogram.init(), x)


@pytest.mark.parametrize("bounds", [(-4.0, 4.0), (-1.0, 1.0), (-6.0, 3.0)])
def test_the_sqnr_is_that_of_the_data(bounds):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    found = encoding(*bounds)
    y = torch.fake_quantize_per_tensor_affine(x, found.scale, found.zero_point, -128, 127)
    measured = 10 * math.log10(float(x.square().sum() / (x - y).square().sum()))
    told = tensor_range("x", "", state_of(x), found)
    assert told.sqnr_db == pytest.approx(measured, abs=0.1)
    half = found.scale / 2  # what rounds to the last integer is not clipped
    clipped = float(((x < bounds[0] - half) | (x > bounds[1] + half)).float().mean())
    assert told.clipped == pytest.approx(clipped, abs=2e-3)
    assert sum(told.counts) == x.numel()
    assert len(told.counts) == BINS
    assert (told.low, told.high) == pytest.approx((float(x.min()), float(x.max())), rel=1e-5)


def test_one_value_is_one_bin():
    told = tensor_range("x", "linear", state_of(torch.full((7,), 2.0)), encoding(0.0, 2.0))
    assert told.counts == (7,)
    assert str(told).startswith("x, read by linear: ")


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    layers = [layer for _ in range(MOST_TENSORS + 3) for layer in (nn.Linear(4, 4), nn.ReLU())]
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(capture(nn.Sequential(*layers).eval(), (torch.randn(64, 4),)), quantizer)
    calibrate(prepared, [torch.randn(64, 4)])
    return report_of(convert_pt2e(prepared))


def test_a_report_has_a_dozen_at_most_the_worst_first_and_stays_small(report):
    found = [one.sqnr_db for one in report.tensors]
    assert len(found) == MOST_TENSORS
    assert found == sorted(found)
    text = json.dumps(report.as_dict()["tensors"])
    assert len(text) <= 5 * 1024
    assert Report.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_the_page_of_a_report_has_a_graph_and_a_histogram_for_each(report):
    titles = {section.title: section for section in report.page_sections()}
    assert list(titles) == ["Summary", "Ops", "Graph", "Worst tensors"]
    (flow,) = titles["Graph"].charts
    assert isinstance(flow, FlowChart)
    assert [node.inputs for node in flow.nodes[:3]] == [(), (flow.nodes[0].id,), (flow.nodes[1].id,)]
    assert len(titles["Worst tensors"].charts) == 1 + MOST_TENSORS
    assert len(titles["Ops"].rows) == len(report.verdicts)


def test_a_report_of_before_has_no_graph_and_no_tensors(report):
    data = report.as_dict()
    del data["tensors"]
    for verdict in data["verdicts"]:
        del verdict["op"]["inputs"]
    old = Report.from_dict(data)
    assert [section.title for section in old.page_sections()] == ["Summary", "Ops"]


def test_a_graph_for_model_explorer(report, tmp_path):
    report.to_model_explorer(tmp_path / "m.json")
    (graph,) = json.loads((tmp_path / "m.json").read_text())["graphs"]
    ids = {node["id"] for node in graph["nodes"]}
    edges = [edge["sourceNodeId"] for node in graph["nodes"] for edge in node["incomingEdges"]]
    assert set(edges) <= ids
    assert len(edges) == len(report.verdicts)
    overlay = json.loads((tmp_path / "m_verdicts.json").read_text())["m"]
    assert overlay["name"] == "verdict"
    assert {name: result["value"] for name, result in overlay["results"].items()} == {
        v.op.name: v.kind for v in report.verdicts
    }


@pytest.mark.parametrize("wrong", [{"counts": (1,) * (BINS + 1)}, {"counts": (-1,)}, {"low": math.inf}])
def test_what_no_range_can_be_is_refused(wrong, report):
    one = report.tensors[0]
    assert isinstance(one, TensorRange)
    with pytest.raises(ValueError, match="histogram has up to|bounds of a range"):
        replace(one, **wrong)
