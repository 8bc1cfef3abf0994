"""Quantize ops on constants are evaluated, whoever wrote them; casts and activations are left alone."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from quant2e.graph.printer import graph_text
from quant2e.graph.qdq_ops import qd
from quant2e.passes.fold_weights import fold_weights, weights_in_memory_once

aten = torch.ops.aten
RANGE = (0.5, 0, -8, 7, torch.int8)


def module(make, **tensors):
    """A graph of ``x`` and the given parameters, by name; ``make(graph, x, ...)`` returns its result."""
    root, graph = nn.Module(), Graph()
    for name, value in tensors.items():
        root.register_buffer(name, value)
    x = graph.placeholder("x")
    graph.output(make(graph, x, *(graph.get_attr(name) for name in tensors)))
    return GraphModule(root, graph)


def quantize(graph, node):
    return graph.call_function(qd.quantize_per_tensor.default, (node, *RANGE))


def test_a_weight_and_what_is_computed_from_one():
    def make(graph, x, w):
        turned = graph.call_function(aten.t.default, (graph.call_function(aten.mul.Tensor, (w, 2.0)),))
        return quantize(graph, w), quantize(graph, turned), quantize(graph, x)

    gm = module(make, w=torch.arange(6.0).view(2, 3) / 2)
    before = gm(torch.ones(2))
    assert fold_weights(gm)
    gm.recompile()
    assert [n.target for n in gm.graph.nodes].count(qd.quantize_per_tensor.default) == 1
    assert torch.equal(gm.w_quantized, torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int8))
    assert torch.equal(gm.w_quantized_1, torch.tensor([[0, 6], [2, 7], [4, 7]], dtype=torch.int8))
    for now, then in zip(gm(torch.ones(2)), before, strict=True):
        assert torch.equal(now, then)
    assert not fold_weights(gm)


@pytest.mark.parametrize("overload", [True, False], ids=["overload", "packet"])
def test_ops_of_other_libraries(overload):
    with torch.library._scoped_library("quant2e_test_fold", "DEF") as library:
        library.define("quantize_half(Tensor x) -> Tensor")
        library.define("dequantize_half(Tensor x) -> Tensor")
        library.impl("quantize_half", lambda x: (x * 2).to(torch.int8), "CompositeExplicitAutograd")
        library.impl("dequantize_half", lambda x: x / 2, "CompositeExplicitAutograd")
        ops = torch.ops.quant2e_test_fold
        q = ops.quantize_half.default if overload else ops.quantize_half

        def make(graph, x, w):
            return graph.call_function(ops.dequantize_half.default, (graph.call_function(q, (w,)),))

        gm = module(make, w=torch.tensor([1.5, -2.0]))
        assert fold_weights(gm)
        assert torch.equal(gm.w_quantized, torch.tensor([3, -4], dtype=torch.int8))
        assert "dequantize_half" in graph_text(gm.graph)
        assert "quantize_half(%w)" not in graph_text(gm.graph)


@pytest.mark.parametrize(
    "make",
    [
        lambda graph, x, w: graph.call_function(qd.convert_element_type.no_fuse, (w, torch.float16)),
        lambda graph, x, w: graph.call_function(aten.relu.default, (w,)),
        lambda graph, x, w: quantize(graph, graph.call_function(aten.add.Tensor, (x, w))),
        lambda graph, x, w: quantize(graph, graph.call_function(aten.rand_like.default, (w,))),
        lambda graph, x, w: quantize(graph, graph.call_function(aten.add_.Tensor, (w, x))),
    ],
    ids=["a cast to float16", "float arithmetic", "an activation", "random numbers", "a buffer that is written"],
)
def test_what_is_left_alone(make):
    gm = module(make, w=torch.ones(2))
    before = graph_text(gm.graph)
    assert not fold_weights(gm)
    assert graph_text(gm.graph) == before


def test_graphs_that_quantize_one_parameter_equally_hold_one_weight():
    weight, other = torch.arange(6.0).view(2, 3) / 2, torch.arange(6.0).view(2, 3) / 2

    def folded(tensor, *numbers):
        def make(graph, x, w):
            return graph.call_function(qd.quantize_per_tensor.default, (w, *numbers))

        gm = module(make, w=tensor)
        fold_weights(gm)
        return gm.w_quantized

    with weights_in_memory_once():
        first = folded(weight, *RANGE)
        assert folded(weight, *RANGE) is first
        assert folded(other, *RANGE) is not first
        assert not torch.equal(folded(weight, 1.0, *RANGE[1:]), first)
    assert folded(weight, *RANGE) is not first
