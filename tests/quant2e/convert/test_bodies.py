"""Bodies of control flow as convert leaves them: portable, and float where calibration never went."""

import pytest
import torch

import quant2e
from quant2e.graph.control_flow import graphs_of
from quant2e.graph.qdq_ops import QUANTIZE
from quant2e.integer import integer_report
from quant2e.report.report import FLOAT, STATIC
from quantizers.xnnpack.quantizer import XNNPACKQuantizer
from tests.control_flow_models import SHAPES, Branches, Loop, Mapped, Nested, Recurrent, captured, data, model, prepared


@pytest.mark.parametrize("kind", list(SHAPES))
def test_the_graph_is_one_of_torch_export(kind):
    converted = quant2e.convert_pt2e(prepared(kind))
    assert any(node.target in QUANTIZE for _, g in list(graphs_of(converted))[1:] for node in g.graph.nodes)
    assert not any(True for _, body in list(graphs_of(converted))[1:] for _ in (*body.parameters(), *body.buffers()))
    (x,) = data(kind, 1)[0]
    with torch.no_grad():
        program = torch.export.export(converted, (x,), strict=False)
        assert torch.equal(program.module()(x), converted(x))


@pytest.mark.parametrize("kind", list(SHAPES))
def test_files_hold_the_bodies(kind, tmp_path):
    made = quant2e.quantize(captured(kind), data(kind, 1)[0], XNNPACKQuantizer().set_global("w8a8"), data(kind))
    made.save(tmp_path / "m.pt2")
    read = quant2e.load(tmp_path / "m.pt2")
    for x in data(kind, 4):
        assert torch.equal(read(*x), made(*x))
    assert str(read.report) == str(made.report)
    assert read.encodings == made.encodings


def test_only_integers_of_weights_are_kept():
    converted = quant2e.convert_pt2e(prepared(Recurrent))
    report = quant2e.report_of(converted)
    assert report.float_bytes == 2 * (64 + 8) * 4
    assert report.quantized_bytes == 2 * (64 + 8 * (4 + 8 + 4))  # weights, and scale, zero point and bias of a channel


def test_a_branch_that_calibration_never_entered_stays_float():
    graph = prepared(Branches, None, 1e6)  # no sum is as large
    with pytest.warns(quant2e.QuantizationWarning, match="3 of 7 float ops quantized, 4 left float"):
        converted = quant2e.convert_pt2e(graph)
    report = quant2e.report_of(converted)
    reason = "calibration never ran this body of control flow"
    assert report.of("true_graph_0.linear_1").kind == report.of("true_graph_0.relu").kind == FLOAT
    assert report.of("true_graph_0.linear_1").reason.startswith(reason)
    assert report.of("false_graph_0.linear_1").kind == STATIC
    assert any(note.startswith(f"true_graph_0: {reason}") for note in report.notes)
    assert not any(node.target in QUANTIZE for node in converted.true_graph_0.graph.nodes)
    x = torch.full((4, 8), 1e6)  # enters it
    with torch.no_grad():
        wanted, got = model(Branches).second(converted_first(converted, x)).relu() * 2, converted(x)
    assert torch.allclose(got, wanted, rtol=1e-4)


def converted_first(converted, x):
    """What enters the branches."""
    from torch.fx import Interpreter

    class Until(Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.name == "cond":
                self.entered = self.env[n.args[3][0]]
            return result

    run = Until(converted)
    run.run(x)
    return run.entered


def test_statistics_of_bodies_are_saved_and_put_back(tmp_path):
    graph = prepared(Nested)
    quant2e.save_statistics(graph, tmp_path / "s")
    fresh = quant2e.prepare_pt2e(captured(Nested), XNNPACKQuantizer().set_global("w8a8"))
    quant2e.load_statistics(fresh, tmp_path / "s")
    x = data(Nested, 1)[0]
    assert torch.equal(quant2e.convert_pt2e(fresh)(*x), quant2e.convert_pt2e(graph)(*x))


@pytest.mark.parametrize("kind", [Mapped, Loop])
def test_ranges_inside_are_selected_on_held_out_data(kind):
    batches = data(kind, 300)
    batches[0][0][0] *= 20  # which minmax keeps, and percentiles do not
    graph = quant2e.prepare_pt2e(captured(kind), XNNPACKQuantizer().set_global("w8a8"))
    quant2e.calibrate(graph, batches)
    before = quant2e.Statistics.of(graph)
    choices = quant2e.select_ranges(graph, batches[2:4])
    assert any("." in choice.observer for choice in choices)
    assert all(choice.tensor for choice in choices)
    after = quant2e.Statistics.of(graph)
    for name, state in before.states.items():  # what was held out is not learned from
        assert all(torch.equal(value, after.states[name][part]) for part, value in state.items())


@pytest.mark.parametrize("kind", list(SHAPES))
def test_integers_inside(kind):
    converted = quant2e.convert_pt2e(prepared(kind))
    integer = quant2e.to_integer(converted)
    report = integer_report(integer)
    assert not report.left
    assert all(v.integer for v in report.verdicts if "linear" in v.name or "conv" in v.name)
    for x in data(kind, 4):
        with torch.no_grad():
            assert torch.allclose(integer(*x), converted(*x), atol=0.05)
    assert any("test vectors do not hold the ops of this body" in note for note in report.notes)
