"""New nodes: where they stand, what they keep of the node they serve, and what they produce."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule

from quant2e.graph.edit import ORIGIN, emit, emit_constant, emit_number, fold_into, folded_ops, replace, set_origin

aten = torch.ops.aten


def _graph(fake=True):
    """``relu(x)``, with everything a node may say in its metadata."""
    graph = Graph()
    x = graph.placeholder("x")
    relu = graph.call_function(aten.relu.default, (x,))
    graph.output(relu)
    value = FakeTensorMode().from_tensor(torch.ones(2, 3)) if fake else torch.ones(2, 3)
    x.meta["val"] = relu.meta["val"] = value
    relu.meta.update({key: f"its {key}" for key in ORIGIN}, tensor_meta="stale", quantization_annotation="its own")
    return GraphModule({}, graph), x, relu


@pytest.mark.parametrize("fake", [True, False])
def test_emit(fake):
    gm, x, relu = _graph(fake)
    turned = emit(relu, aten.permute.default, x, [1, 0])
    total = emit(relu, aten.sum.dim_IntList, turned, [0], dtype=torch.float64)
    assert [node.name for node in gm.graph.nodes] == [
        "x",
        "permute_default",
        "sum_dim_int_list",
        "relu_default",
        "output",
    ]
    assert {key: total.meta[key] for key in total.meta if key != "val"} == {key: f"its {key}" for key in ORIGIN}
    assert (turned.meta["val"].shape, total.meta["val"].shape, total.meta["val"].dtype) == ((3, 2), (2,), torch.float64)
    assert isinstance(total.meta["val"], FakeTensor) == fake


def test_folded_ops_are_told_in_order():
    _, _, relu = _graph()
    assert folded_ops(relu) == ()
    fold_into(relu, "norm")
    fold_into(relu, "add", "mul")
    assert folded_ops(relu) == ("norm", "add", "mul")


def test_emit_without_tensors():
    gm, _, relu = _graph()
    steps = emit(relu, aten.arange.default, 5, device=torch.device("cpu"))
    assert isinstance(steps.meta["val"], FakeTensor)
    assert steps.meta["val"].shape == (5,)


def test_emit_refuses_what_the_op_refuses():
    _, x, relu = _graph()
    with pytest.raises(RuntimeError):
        emit(relu, aten.mm.default, x, x)


def test_emit_on_an_unknown_value():
    _, x, relu = _graph()
    del x.meta["val"]
    assert "val" not in emit(relu, aten.neg.default, x).meta


def test_constants():
    gm, x, relu = _graph()
    first = emit_constant(gm, relu, "offset", torch.arange(3.0))
    second = emit_constant(gm, relu, "offset", torch.arange(3.0))
    assert (first.target, second.target) == ("offset", "offset_1")
    assert isinstance(first.meta["val"], FakeTensor)
    moved = emit(relu, aten.add.Tensor, x, first)
    half = emit(relu, aten.mul.Tensor, moved, emit_number(gm, relu, 0.5))
    relu.update_arg(0, half)
    gm.recompile()
    assert torch.equal(gm(torch.zeros(2, 3)), torch.tensor([0.0, 0.5, 1.0]).expand(2, 3))


def test_real_and_fake_operands_mix():
    gm, x, relu = _graph()
    offset = emit_constant(gm, relu, "offset", torch.ones(3))
    offset.meta["val"] = gm.offset
    assert isinstance(emit(relu, aten.add.Tensor, x, offset).meta["val"], FakeTensor)


def test_origin_with_a_value():
    _, x, relu = _graph()
    set_origin(x, relu)
    assert x.meta["stack_trace"] == "its stack_trace"
    value = torch.ones(1)
    set_origin(x, relu, value=value)
    assert x.meta["val"] is value


def test_replace():
    gm, x, relu = _graph()
    replace(relu, emit(relu, aten.neg.default, x))
    assert [node.name for node in gm.graph.nodes] == ["x", "neg_default", "output"]
    neg = next(node for node in gm.graph.nodes if node.target is aten.neg.default)
    output = next(iter(neg.users))
    replace(neg, emit(output, aten.abs.default, neg))
    assert [node.name for node in gm.graph.nodes] == ["x", "neg_default", "abs_default", "output"]
