"""One dequantize for each consumer."""

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from quant2e.graph.qdq_ops import qd
from quant2e.passes.split_dequantize import split_dequantize

aten = torch.ops.aten
S8 = (0.5, 0, -128, 127, torch.int8)


def build(*consume):
    graph = Graph()
    q = graph.call_function(qd.quantize_per_tensor.default, (graph.placeholder("x"), *S8))
    dq = graph.call_function(qd.dequantize_per_tensor.default, (q, *S8), {"out_dtype": torch.float16})
    graph.output(tuple(make(graph, dq) for make in consume))
    return GraphModule(nn.Module(), graph)


def relu(graph, dq):
    return graph.call_function(aten.relu.default, (dq,))


def twice(graph, dq):
    return graph.call_function(aten.add.Tensor, (dq, dq))


def dequantizes(gm):
    return [n for n in gm.graph.nodes if n.target is qd.dequantize_per_tensor.default]


def test_one_each():
    gm = build(relu, twice, relu)
    before = gm(torch.randn(4))
    assert split_dequantize(gm)
    gm.recompile()
    gm.graph.lint()
    nodes = dequantizes(gm)
    assert [len(n.users) for n in nodes] == [1, 1, 1]
    assert len({(n.args, tuple(n.kwargs.items())) for n in nodes}) == 1
    assert [next(iter(n.users)).target for n in nodes] == [aten.relu.default, aten.add.Tensor, aten.relu.default]
    assert len(gm(torch.randn(4))) == len(before) == 3
    assert not split_dequantize(gm)


def test_one_consumer_however_often_it_reads():
    assert not split_dequantize(build(twice))


def test_a_dynamic_requantization_shares():
    def requantize(graph, dq):
        chosen = graph.call_function(qd.choose_qparams.tensor, (dq, -128, 127, 1e-6, torch.int8))
        return graph.call_function(qd.quantize_per_tensor.tensor, (dq, chosen, chosen, *S8[2:]))

    assert not split_dequantize(build(requantize))
    gm = build(requantize, relu)
    assert split_dequantize(gm)
    assert [len(n.users) for n in dequantizes(gm)] == [2, 1]
