"""Quantization ahead of moves: the same values, and what keeps it where it is."""

import pytest
import torch
from torch import nn

from lowering.rewrites.moves import quantized_before_moves
from quant2e import capture, convert_pt2e, prepare_pt2e
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.qdq_ops import qd
from quantizers import OpenVINOQuantizer

ROWS = (torch.linspace(-3, 3, 2 * 5 * 8).reshape(2, 5, 8).sin(),)


class Heads(nn.Module):
    """Attention of two heads; ``also``: what else reads the queries before they are split."""

    def __init__(self, also=None, between=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.also, self.between = *(nn.Linear(8, 8) for _ in range(3)), also, between

    def forward(self, x):
        rows = self.q(x)
        q, k, v = (self.between(each).unflatten(-1, (2, 4)).transpose(1, 2) for each in (rows, self.k(x), self.v(x)))
        y = ((q @ k.transpose(2, 3)) * 0.5).softmax(-1) @ v
        return y if self.also is None else y.sum() + self.also(rows)


def converted(model):
    prepared = prepare_pt2e(capture(model.eval(), ROWS), OpenVINOQuantizer(isa="avx512_vnni").set_global("w8a8"))
    prepared(*ROWS)
    return copy_graph(convert_pt2e(prepared))


def sources(module):
    """What each quantize op of an activation reads."""
    nodes = [n for n in module.graph.nodes if n.target is qd.quantize_per_tensor.default]
    return [str(n.args[0].target) for n in nodes]


def test_queries_and_keys_are_quantized_where_their_layers_write_them():
    module = converted(Heads())
    before = module(*ROWS)
    assert sources(module).count("aten.linear.default") == 0
    assert quantized_before_moves(module) == 2
    module.recompile()
    module.graph.lint()
    assert sources(module).count("aten.linear.default") == 2
    assert torch.equal(module(*ROWS), before)
    for node in module.graph.nodes:
        if node.target is qd.quantize_per_tensor.default:
            assert (node.meta["val"].shape, node.meta["val"].dtype) == (node.args[0].meta["val"].shape, node.args[-1])
    assert quantized_before_moves(module) == 0


@pytest.mark.parametrize(
    ("model", "count"),
    [(Heads(also=lambda rows: rows.sum()), 1), (Heads(between=lambda x: x.sin()), 0)],
    ids=["another reader", "an op that computes"],
)
def test_it_stays_where_somebody_else_reads_or_computes(model, count):
    module = converted(model)
    before = module(*ROWS)
    assert quantized_before_moves(module) == count
    module.recompile()
    assert torch.equal(module(*ROWS), before)
