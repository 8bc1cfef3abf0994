"""Observers in the graph: where they stand, one per group, and that taking them out gives the graph back."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule

from quant2e.annotation.interop import read_plan
from quant2e.annotation.plan import DerivedFrom, Edge, Group, Output, Plan
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation, QuantizationSpec, SharedQuantizationSpec
from quant2e.errors import AnnotationError
from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.printer import graph_text
from quant2e.observers.base import OBSERVER_PREFIX
from quant2e.observers.fake_quant import FakeQuantize
from quant2e.observers.measuring import MinMaxObserver, PerChannelMinMaxObserver
from quant2e.prepare.insert_observers import make_observers, observe
from tests.quant2e.annotators import ACT, DYNAMIC, WEIGHT_PER_TENSOR, aten

UINT8 = QuantizationSpec(torch.uint8, MinMaxObserver, 0, 255, torch.per_tensor_affine)


class Net(nn.Module):
    """Several consumers, one tensor twice in an op, an operand list, several outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, y):
        a = self.first(x)
        b = self.second(a) + a
        return torch.cat([a, b, a]), (b * b, y.relu())


@cache
def captured():
    return capture(Net().eval(), (torch.randn(2, 4), torch.randn(2, 4)))


def net():
    return copy_graph(captured())


def observed(gm: GraphModule):
    plan = read_plan(gm)
    copy = copy_graph(gm)
    names = observe(copy, plan, dict(enumerate(make_observers(plan))))
    copy.graph.lint()
    return copy, plan, names


def strip(gm: GraphModule):
    """Takes every observer out again."""
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith(OBSERVER_PREFIX):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    return gm


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_strip_after_observe_is_the_identity(data):
    gm = net()
    before = graph_text(gm.graph)
    spec = st.sampled_from([ACT, ACT, UINT8, DYNAMIC, None])
    points = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and data.draw(st.booleans()):
            inputs = {}
            for src in dict.fromkeys(node.all_input_nodes):
                shared = points and data.draw(st.integers(0, 3)) == 0
                inputs[src] = SharedQuantizationSpec(data.draw(st.sampled_from(points))) if shared else data.draw(spec)
                points.append((src, node))
            node.meta[ANNOTATION] = QuantizationAnnotation(inputs, output := data.draw(spec), data.draw(st.booleans()))
            points += [node] if output is not None else []
    copy, plan, names = observed(gm)
    assert graph_text(gm.graph) == before
    assert set(names) == set(range(len(plan.groups)))
    x = (torch.randn(2, 4), torch.randn(2, 4))
    for ours, theirs in zip(
        torch.utils._pytree.tree_leaves(copy(*x)), torch.utils._pytree.tree_leaves(gm(*x)), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert graph_text(strip(copy).graph) == before


def test_golden_observed(golden):
    gm = net()
    for node in gm.graph.nodes:
        if node.target is aten.linear.default:
            node.meta[ANNOTATION] = QuantizationAnnotation({node.args[0]: ACT, node.args[1]: WEIGHT_PER_TENSOR}, ACT)
        if node.target is aten.add.Tensor:
            node.meta[ANNOTATION] = QuantizationAnnotation({node.args[0]: ACT, node.args[1]: UINT8}, UINT8)
        if node.target is aten.cat.default:
            first, second = dict.fromkeys(node.args[0])
            shared = SharedQuantizationSpec((first, node))
            node.meta[ANNOTATION] = QuantizationAnnotation({first: ACT, second: shared}, shared)
    copy, plan, _ = observed(gm)
    golden("graphs/observed_net", f"{plan}\n\n{graph_text(copy.graph)}")


def test_names_count_in_the_order_of_the_graph_and_shared_observers_are_one():
    gm = net()
    for node in gm.graph.nodes:
        if node.target is aten.cat.default:
            first, second = dict.fromkeys(node.args[0])
            shared = SharedQuantizationSpec((first, node))
            node.meta[ANNOTATION] = QuantizationAnnotation({first: ACT, second: shared}, shared)
        if node.target is aten.mul.Tensor:
            node.meta[ANNOTATION] = QuantizationAnnotation({node.args[0]: UINT8}, UINT8)
    copy, plan, names = observed(gm)
    called = [str(n.target) for n in copy.graph.nodes if n.op == "call_module"]
    assert list(dict.fromkeys(called)) == [f"{OBSERVER_PREFIX}{i}" for i in range(3)]
    assert len(called) == 5
    assert len(names) == len(plan.groups) == 3
    assert len({id(copy.get_submodule(name)) for name in names.values()}) == 3


def test_a_taken_name_is_left_alone():
    gm = net()
    taken = nn.Identity()
    gm.add_submodule("activation_post_process_0", taken)
    add = next(n for n in gm.graph.nodes if n.target is aten.add.Tensor)
    add.meta[ANNOTATION] = QuantizationAnnotation({}, ACT)
    _, _, names = observed(gm)
    assert names == {0: "activation_post_process_1"}


def test_new_nodes_know_where_they_come_from():
    gm = net()
    for node in gm.graph.nodes:
        if node.target is aten.linear.default:
            node.meta[ANNOTATION] = QuantizationAnnotation({node.args[0]: ACT, node.args[1]: WEIGHT_PER_TENSOR}, ACT)
    copy, _, _ = observed(gm)
    calls = [n for n in copy.graph.nodes if n.op == "call_module"]
    for call in calls:
        assert call.meta["val"].shape == call.args[0].meta["val"].shape
        assert "nn_module_stack" in call.meta
        assert "stack_trace" in call.meta
        assert call.meta["from_node"] == call.args[0].meta["from_node"]  # it holds that tensor
    paths = [list(c.meta["nn_module_stack"].values())[-1][0].replace("L['self'].", "") for c in calls]
    assert set(paths) == {"first", "second"}


def test_an_observer_that_cannot_be_made():
    refused = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_channel_symmetric, ch_axis=0)
    with pytest.raises(
        AnnotationError, match=r"spec of \(x -> a\) cannot make its observer: MinMaxObserver refused dtype"
    ):
        make_observers(Plan((Group(refused, (Edge("x", "a"),)),)))
    no_module = QuantizationSpec(torch.int8, lambda **_: 3)
    with pytest.raises(AnnotationError, match=r"spec of \(y\) made a int; an observer is an nn.Module"):
        make_observers(Plan((Group(no_module, (Output("y"),)),)))


def test_derived_observers_get_their_sources_in_the_order_written():
    def derived(*sources):
        return DerivedFrom(
            sources=sources, derive=list, dtype=torch.int32, quant_min=None, quant_max=None, qscheme=None, ch_axis=None
        )

    x, w, b, c = Output("x"), Output("w"), Output("b"), Output("c")
    groups = (Group(derived(b, x), (c,)), Group(derived(w, x), (b,)), Group(ACT, (x,)), Group(WEIGHT_PER_TENSOR, (w,)))
    on_c, on_b, on_x, on_w = make_observers(Plan(groups))
    assert on_c.sources == [on_b, on_x]
    assert on_b.sources == [on_w, on_x]
    long = tuple(Group(derived(Output(f"n{i + 1}")), (Output(f"n{i}"),)) for i in range(10_000))
    assert len(make_observers(Plan((*long, Group(ACT, (Output("n10000"),)))))) == 10_001


def test_a_fake_quantizer_of_channels_whose_spec_names_no_axis_takes_that_of_its_observer():
    """As Core ML's quantizer writes its weights."""
    spec = SimpleNamespace(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=None,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=PerChannelMinMaxObserver.with_args(ch_axis=1)),
    )
    (made,) = make_observers(Plan((Group(spec, (Output("w"),)),)))
    made(torch.tensor([[1.0, -127.0], [-2.0, 3.0]]))
    assert made.ch_axis == 1
    assert made.calculate_qparams()[0].tolist() == pytest.approx([2 / 127, 1.0])
