"""Bodies of control flow: quantized inside, by any quantizer; reported by path; what stays float says why."""

import copy
import pickle

import pytest
import torch
from torch import nn

import quant2e
from quant2e.calibration.statistics import observers_of
from quant2e.errors import AnnotationError
from quant2e.pt2e import disable_observer
from quant2e.ranges.sqnr import sqnr_db
from quant2e.report.report import FLOAT, FOLDED, STATIC
from quantizers.x86.quantizer import X86InductorQuantizer
from quantizers.xnnpack.quantizer import XNNPACKQuantizer
from tests.control_flow_models import SHAPES, Branches, Loop, Mapped, Nested, Recurrent, captured, data, model, prepared
from tests.quant2e.annotators import products


def quality(reference, made, batches):
    with torch.no_grad():
        pairs = [(reference(*batch), made(*batch)) for batch in batches]
    signal = sum(float(a.double().square().sum()) for a, _ in pairs)
    return sqnr_db(signal, sum(float((a - b).double().square().sum()) for a, b in pairs))


QUANTIZERS = {
    "xnnpack": lambda: XNNPACKQuantizer().set_global("w8a8"),
    "xnnpack dynamic": lambda: XNNPACKQuantizer().set_global("w8a8-dynamic"),
    "x86": lambda: X86InductorQuantizer().set_global("w8a8"),
    "a guest": products,
}


@pytest.mark.parametrize("kind", list(SHAPES))
@pytest.mark.parametrize("name", QUANTIZERS)
def test_products_inside_are_quantized(kind, name):
    graph = prepared(kind, QUANTIZERS[name]())
    exact = model(kind)
    assert quality(exact, graph, data(kind, 4)) > 100  # observers change nothing
    converted = quant2e.convert_pt2e(graph)
    report = quant2e.report_of(converted)
    assert report.int8_mac_share == 1.0 or (kind, name) == (Nested, "xnnpack dynamic")  # which has no convolution
    assert all("." in v.op.name for v in report.verdicts if v.op.macs and v.op.module != "first")
    assert 27 < quality(exact, converted, data(kind)) < 80


def test_the_report_lists_ops_by_branch_and_module():
    report = quant2e.report_of(prepared(Nested))
    step = "while_loop_body_graph_0"
    found = {v.op.name: (v.kind, v.op.module) for v in report.verdicts}
    assert found == {
        f"{step}.sum_1": (FLOAT, ""),
        f"{step}.linear": (STATIC, "b"),
        f"{step}.relu_": (STATIC, ""),
        f"{step}.sub": (STATIC, ""),
        f"{step}.true_graph_0.linear": (STATIC, "a"),
        f"{step}.false_graph_0.conv1d": (STATIC, "c"),
        f"{step}.false_graph_0.batch_norm": (FOLDED, "norm"),
    }
    assert any("multiply-accumulates are those of one run" in note for note in report.notes)


def test_encodings_name_the_body():
    encodings = quant2e.quantize(captured(Mapped), data(Mapped, 1)[0], QUANTIZERS["xnnpack"](), data(Mapped)).encodings
    assert all(point.startswith("body_graph_0.") for group in encodings.groups for point in group.points)
    assert quant2e.Encodings.from_dict(encodings.as_dict()) == encodings


def test_settings_reach_ops_inside():
    quantizer = QUANTIZERS["xnnpack"]().set_module_name("second", None).set_node("false_graph_0.linear_1", None)
    report = quant2e.report_of(prepared(Branches, quantizer))
    assert report.of("true_graph_0.linear_1").reason == "set to float by module name 'second'"
    assert report.of("false_graph_0.linear_1").reason == "set to float by node 'false_graph_0.linear_1'"
    quantizer = QUANTIZERS["xnnpack"]().set_edge("linear", "linear_1", None)
    report = quant2e.report_of(prepared(Branches, quantizer))
    assert report.of("true_graph_0.linear_1").kind == report.of("false_graph_0.linear_1").kind == FLOAT


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q: q.set_module_name("fourth", None),
        lambda q: q.set_node("true_graph_0.conv", None),
        lambda q: q.set_edge("linear", "conv", None),
    ],
)
def test_settings_that_match_no_graph_of_the_program_are_errors(wrong):
    with pytest.raises(AnnotationError, match="fourth|conv"):
        prepared(Branches, wrong(QUANTIZERS["xnnpack"]()))


class Scaled(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.first, self.how = nn.Linear(8, 8), how

    def forward(self, x):
        return self.how(self, x)


def in_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.first(x)


def writing_in_place(gm):
    body = gm.true_graph_0
    first = next(iter(body.graph.nodes))
    with body.graph.inserting_after(first):
        body.graph.call_function(torch.ops.aten.mul_.Tensor, (first, 1.0))
    body.recompile()


def shared(gm):
    (node,) = (node for node in gm.graph.nodes if node.name == "cond")
    node.args = (node.args[0], node.args[1], node.args[1], node.args[3])
    with gm.graph.inserting_after(node):
        again = gm.graph.node_copy(node)
    (part,) = node.users
    with gm.graph.inserting_after(part):
        total = gm.graph.call_function(torch.ops.aten.add.Tensor, (part, part))
    part.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    with gm.graph.inserting_after(again):
        other = gm.graph.node_copy(part)
    other.args = (again, *part.args[1:])
    total.args = (part, other)
    for copied, source in ((again, node), (other, part), (total, part)):
        copied.meta["val"] = source.meta["val"]
    gm.recompile()


@pytest.mark.parametrize(
    ("change", "reason"),
    [(writing_in_place, "changes a tensor in place that others see"), (shared, "is run by other ops as well")],
)
def test_bodies_that_stay_float_say_why(change, reason):
    gm = captured(Branches)
    change(gm)
    report = quant2e.report_of(quant2e.prepare_pt2e(gm, QUANTIZERS["xnnpack"]()))
    inside = [v for v in report.verdicts if v.op.name.startswith("true_graph_0.")]
    assert inside
    assert all(v.kind == FLOAT and reason in v.reason for v in inside)
    assert any(reason in note for note in report.notes)


def test_autocast_stays_float():
    gm = quant2e.capture(Scaled(in_autocast).eval(), (torch.randn(2, 8),))
    report = quant2e.report_of(quant2e.prepare_pt2e(gm, QUANTIZERS["xnnpack"]()))
    assert [v.kind for v in report.verdicts if v.op.macs] == [FLOAT]
    assert any("only cond, while_loop, scan and map are quantized inside" in note for note in report.notes)


def test_a_prepared_graph_calibrates_in_a_loop_of_its_own_with_gradients_on():
    graph = quant2e.prepare_pt2e(captured(Loop), QUANTIZERS["xnnpack"]())
    for batch in data(Loop):
        graph(*batch)
    want = quant2e.convert_pt2e(prepared(Loop))
    assert torch.equal(quant2e.convert_pt2e(graph)(*data(Loop, 1)[0]), want(*data(Loop, 1)[0]))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
def test_a_copy_has_observers_of_its_own(again):
    graph = prepared(Nested)
    copied = again(graph)
    assert observers_of(copied).keys() == observers_of(graph).keys()
    assert not set(observers_of(copied).values()) & set(observers_of(graph).values())
    x = data(Nested, 1)[0]
    assert torch.equal(quant2e.convert_pt2e(copied)(*x), quant2e.convert_pt2e(graph)(*x))
    assert f"{len(observers_of(graph))} observers" in repr(graph)


def test_preparing_twice_is_refused():
    with pytest.raises(quant2e.Quant2eError, match="already prepared"):
        quant2e.prepare_pt2e(prepared(Recurrent), QUANTIZERS["xnnpack"]())


@pytest.mark.parametrize("kind", [Branches, Recurrent, Nested])
def test_training_reaches_the_bodies(kind):
    torch.manual_seed(0)
    quantizer = (X86InductorQuantizer if kind is Recurrent else XNNPACKQuantizer)().set_global("w8a8-qat")
    graph = quant2e.prepare_qat_pt2e(captured(kind), quantizer)
    optimizer = torch.optim.SGD(graph.parameters(), 1e-2)
    before = {path: p.detach().clone() for path, p in graph.named_parameters()}
    for (x,) in data(kind, 8):
        optimizer.zero_grad()
        (graph(x) - x).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[path]) for path, p in graph.named_parameters() if not path.endswith("_scale"))
    graph.eval().apply(disable_observer)
    converted = quant2e.convert_pt2e(graph)
    assert quant2e.report_of(converted).int8_mac_share == 1.0
    assert not any("nothing is fake-quantized" in note for note in quant2e.report_of(converted).notes)
    assert quality(graph, converted, data(kind, 8)) > 30
