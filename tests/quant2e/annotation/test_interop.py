"""Annotations of any library become a plan, or an error that says which node, which operand and what to do."""

import pytest
import torch
from torch import nn
from torch.fx import Graph

from quant2e.annotation.interop import read_plan
from quant2e.annotation.plan import Edge, Output
from quant2e.annotation.specs import (
    ANNOTATION,
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    SharedQuantizationSpec,
)
from quant2e.errors import AnnotationError, PlanError
from quant2e.graph.captured.capture import capture
from quant2e.observers.measuring import MinMaxObserver
from tests.quant2e.annotators import ACT, WEIGHT_PER_TENSOR, aten


class Pair(nn.Module):
    def forward(self, x, y):
        return x + y


class Functional(nn.Module):
    def __init__(self, forward, **buffers):
        super().__init__()
        self._forward = forward
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *args):
        return self._forward(self, *args)


def graph_of(forward, *inputs, **buffers):
    return capture(Functional(forward, **buffers).eval(), inputs)


def node_of(gm, target):
    return next(n for n in gm.graph.nodes if n.target is target)


@pytest.fixture
def pair():
    gm = capture(Pair().eval(), (torch.randn(2), torch.randn(2)))
    x, y, add = [n for n in gm.graph.nodes if n.op != "output"]
    return gm, x, y, add


def test_a_spec_on_what_is_no_operand(pair):
    gm, x, y, add = pair
    add.meta[ANNOTATION] = QuantizationAnnotation({add: ACT})
    with pytest.raises(
        AnnotationError, match=r"'add' \(aten.add.Tensor\).* puts a spec on 'add', which is not an oper"
    ):
        read_plan(gm)


def test_a_spec_on_a_constant():
    gm = graph_of(lambda self, x: x * 2.5, torch.randn(2))
    node_of(gm, aten.mul.Tensor).meta[ANNOTATION] = QuantizationAnnotation({2.5: ACT})
    with pytest.raises(AnnotationError, match="constant 2.5.*Lift the constant to a buffer"):
        read_plan(gm)


def test_a_node_of_another_graph(pair):
    gm, x, y, add = pair
    other = capture(Pair().eval(), (torch.randn(2), torch.randn(2)))
    stranger = next(iter(other.graph.nodes))
    add.meta[ANNOTATION] = QuantizationAnnotation({x: SharedQuantizationSpec((stranger, add)), y: ACT})
    with pytest.raises(PlanError, match=r"\(x -> add\) refers to 'x', which is not in the graph"):
        read_plan(gm)
    add.meta[ANNOTATION] = QuantizationAnnotation({stranger: ACT})
    with pytest.raises(AnnotationError, match="'x'.*of another graph"):
        read_plan(gm)


@pytest.mark.parametrize(
    "place", [1.0, (1.0, "add"), ("x", "y", "z"), (), "add"], ids=["float", "edge", "triple", "empty", "name"]
)
def test_a_reference_that_is_no_point(pair, place):
    gm, x, y, add = pair
    add.meta[ANNOTATION] = QuantizationAnnotation({x: SharedQuantizationSpec(place), y: ACT})
    with pytest.raises(PlanError, match=r"spec of \(x -> add\) refers to"):
        read_plan(gm)


def test_an_edge_that_does_not_exist_dangles(pair):
    gm, x, y, add = pair
    add.meta[ANNOTATION] = QuantizationAnnotation({x: SharedQuantizationSpec((y, x)), y: ACT})
    with pytest.raises(PlanError, match=r"dangling share: \(x -> add\) => \(y -> x\)"):
        read_plan(gm)


@pytest.mark.parametrize("note", [{"input_qspec_map": {}}, "int8", QuantizationAnnotation(input_qspec_map=None)])
def test_what_is_no_annotation(pair, note):
    gm, x, y, add = pair
    add.meta[ANNOTATION] = note
    with pytest.raises(AnnotationError, match="put a QuantizationAnnotation there"):
        read_plan(gm)


@pytest.mark.parametrize("spec", ["int8", torch.int8, object()])
def test_what_is_no_spec(pair, spec):
    gm, x, y, add = pair
    add.meta[ANNOTATION] = QuantizationAnnotation({x: spec})
    with pytest.raises(AnnotationError, match=r"spec of \(x -> add\).*is not a quantization spec"):
        read_plan(gm)


def test_foreign_classes_mean_what_ours_mean(pair):
    from torchao.quantization.pt2e import quantizer as ao
    from torchao.quantization.pt2e.observer import MinMaxObserver as AOMinMaxObserver

    gm, x, y, add = pair

    def plan_of(lib, observer):
        plain = lib.QuantizationSpec(torch.int8, observer, -128, 127, torch.per_tensor_affine)
        shared = lib.SharedQuantizationSpec((x, add))
        derived = lib.DerivedQuantizationSpec([(x, add), (y, add)], list, torch.int32, -(2**31), 2**31 - 1)
        fixed = lib.FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255)
        texts = []
        for on_x, on_y, out in ((plain, shared, derived), (plain, fixed, shared), (plain, None, fixed)):
            y_spec = plain if out is derived else on_y
            add.meta[ANNOTATION] = lib.QuantizationAnnotation({x: on_x, y: y_spec}, out)
            texts.append(str(read_plan(gm)))
        return texts

    class Ours:
        QuantizationSpec = QuantizationSpec
        SharedQuantizationSpec = SharedQuantizationSpec
        DerivedQuantizationSpec = DerivedQuantizationSpec
        FixedQParamsQuantizationSpec = FixedQParamsQuantizationSpec
        QuantizationAnnotation = QuantizationAnnotation

    theirs = plan_of(ao, AOMinMaxObserver)
    assert theirs == plan_of(Ours, MinMaxObserver)
    assert theirs == [
        (
            "s8[-128, 127], per tensor affine, MinMaxObserver: x -> add\n"
            "s8[-128, 127], per tensor affine, MinMaxObserver: y -> add\n"
            "s32[-2147483648, 2147483647], derived from (x -> add) and (y -> add): add"
        ),
        (
            "s8[-128, 127], per tensor affine, MinMaxObserver: x -> add; add\n"
            "u8[0, 255], scale 0.00390625 zero point 0: y -> add"
        ),
        "s8[-128, 127], per tensor affine, MinMaxObserver: x -> add\nu8[0, 255], scale 0.00390625 zero point 0: add",
    ]


def test_keyword_operands_are_points():
    gm = graph_of(lambda self, x, w: torch.nn.functional.linear(x, w), torch.randn(2, 3), torch.randn(4, 3))
    linear = node_of(gm, aten.linear.default)
    x, w = linear.args
    linear.args, linear.kwargs = (x,), {"weight": w}
    linear.meta[ANNOTATION] = QuantizationAnnotation({w: WEIGHT_PER_TENSOR, x: ACT})
    assert [g.points for g in read_plan(gm).groups] == [(Edge("args_0", "linear"),), (Edge("args_1", "linear"),)]


def test_operands_in_lists_are_points():
    gm = graph_of(lambda self, x, y: torch.cat([x, y, x]), torch.randn(2), torch.randn(2))
    cat = node_of(gm, aten.cat.default)
    x, y = dict.fromkeys(cat.args[0])
    cat.meta[ANNOTATION] = QuantizationAnnotation({x: ACT, y: SharedQuantizationSpec((x, cat))})
    assert [g.points for g in read_plan(gm).groups] == [(Edge(x.name, "cat"), Edge(y.name, "cat"))]


def test_the_graphs_output_is_a_consumer(pair):
    gm, x, y, add = pair
    output = next(n for n in gm.graph.nodes if n.op == "output")
    output.meta[ANNOTATION] = QuantizationAnnotation({add: ACT})
    assert [g.points for g in read_plan(gm).groups] == [(Edge("add", "output"),)]


# ------------------------------------------------------------------------------------------- what cannot be quantized


def ignored_of(gm):
    return [(str(item.point), item.reason) for item in read_plan(gm).ignored]


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (torch.int64, "a int64 tensor, not a float one"),
        (torch.int32, "a int32 tensor, not a float one"),
        (torch.bool, "a bool tensor, not a float one"),
        (torch.float64, "a float64 tensor; float32, float16 and bfloat16 can be quantized"),
        (torch.complex64, "a complex64 tensor, not a float one"),
    ],
)
def test_tensors_that_are_not_float(dtype, reason):
    gm = capture(Pair().eval(), (torch.ones(2, dtype=dtype), torch.randn(2)))
    add = node_of(gm, aten.add.Tensor)
    x, y = add.args
    add.meta[ANNOTATION] = QuantizationAnnotation({x: ACT, y: SharedQuantizationSpec((x, add))})
    plan = read_plan(gm)
    assert plan.groups == ()
    assert [(str(i.point), i.reason) for i in plan.ignored] == [("x -> add", reason)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_that_are_float(dtype):
    gm = capture(Pair().eval(), (torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype)))
    add = node_of(gm, aten.add.Tensor)
    add.meta[ANNOTATION] = QuantizationAnnotation({add.args[0]: ACT}, ACT)
    assert [g.points for g in read_plan(gm).groups] == [(Edge("x", "add"),), (Output("add"),)]


def test_several_tensors_at_once_are_not_one_tensor():
    gm = graph_of(lambda self, x: torch.split(x, 1)[0], torch.randn(2))
    split = node_of(gm, aten.split.Tensor)
    split.meta[ANNOTATION] = QuantizationAnnotation({}, ACT)
    assert ignored_of(gm) == [("split", "not a single tensor")]


def test_none_for_an_integer_tensor_is_no_news():
    gm = capture(Pair().eval(), (torch.ones(2, dtype=torch.int64), torch.randn(2)))
    add = node_of(gm, aten.add.Tensor)
    add.meta[ANNOTATION] = QuantizationAnnotation({add.args[0]: None})
    assert ignored_of(gm) == []


# --------------------------------------------------------------------------------------------------- writes in place


def test_a_buffer_that_the_op_writes_into():
    gm = graph_of(lambda self, x: self.cache.add_(x) * 2, torch.randn(2), cache=torch.zeros(2))
    add = node_of(gm, aten.add_.Tensor)
    cache, x = add.args
    add.meta[ANNOTATION] = QuantizationAnnotation({cache: ACT, x: ACT}, ACT)
    assert ignored_of(gm) == [(f"{cache.name} -> add_", "written in place by 'add_'")]
    assert [g.points for g in read_plan(gm).groups] == [(Edge(x.name, "add_"),), (Output("add_"),)]


def test_a_view_of_a_buffer_that_is_written_at_a_runtime_index():
    def forward(self, x, i):
        torch.select(self.cache, 0, i.item()).copy_(x)
        return torch.relu(self.cache)

    gm = graph_of(forward, torch.randn(2), torch.tensor(1), cache=torch.zeros(4, 2))
    copy, relu = node_of(gm, aten.copy_.default), node_of(gm, aten.relu.default)
    copy.meta[ANNOTATION] = QuantizationAnnotation({copy.args[0]: ACT, copy.args[1]: ACT})
    relu.meta[ANNOTATION] = QuantizationAnnotation({relu.args[0]: ACT}, ACT)
    why = "written in place by 'copy_'"
    assert ignored_of(gm) == [("select -> copy_", why), ("cache -> relu", why)]


IN_PLACE = {
    "read only there": (lambda x: torch.relu_(x * x), []),
    "read before": (lambda x: (lambda y: y.sigmoid() * torch.relu_(y))(x * x), []),
    "through a view, and only so": (lambda x: (x * x).view(-1).relu_(), []),
    "two in a row": (lambda x: torch.relu_(x * x).clamp_(max=1.0), []),
    "through a view of what is read afterwards": (lambda x: (lambda y: (y.view(-1).relu_(), y + x)[1])(x * x), ["mul"]),
    "beside a view that is read": (
        lambda x: (lambda y, v: torch.relu_(y).sum() + v)(*(lambda y: (y, y.view(-1)))(x * x)),
        ["mul"],
    ),
    "an input": (lambda x: torch.relu_(x) + 1, ["x"]),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_activations_written_in_place(name):
    """A quantized operand is a copy; where somebody else would see what is written, it stays float and is noted."""
    forward, hidden = IN_PLACE[name]
    gm = graph_of(lambda self, x: forward(x), torch.randn(4))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta[ANNOTATION] = QuantizationAnnotation(dict.fromkeys(node.all_input_nodes, ACT), ACT)
    ignored = {item.point.tensor.replace("args_0", "x") for item in read_plan(gm).ignored}
    assert (ignored == set()) == (hidden == [])
    assert set(hidden) <= ignored


def test_nodes_without_metadata_are_taken_at_their_word():
    graph = Graph()
    x = graph.placeholder("x")
    neg = graph.call_function(aten.neg.default, (x,), name="neg")
    graph.output(neg)
    neg.meta[ANNOTATION] = QuantizationAnnotation({x: ACT}, ACT)
    assert [str(p) for g in read_plan(torch.fx.GraphModule({}, graph)).groups for p in g.points] == ["x -> neg", "neg"]
