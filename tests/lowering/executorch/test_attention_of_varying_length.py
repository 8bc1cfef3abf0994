"""Attention whose sequence length varies: one delegate, and the same numbers at every length."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quant2e
from lowering import to_executorch
from lowering.executorch.xnnpack.legalize.attention_scores import scores_in_three_dimensions
from lowering.executorch.xnnpack.legalize.matmul import batched_matmul

LENGTH = torch.export.Dim("length", min=2, max=32)
HEADS, WIDTH = 4, 8


def spelled_out(q, k, v, mask):
    scores = q @ k.transpose(-1, -2) * 0.3
    return F.dropout((scores + (1 - mask) * -30.0).softmax(3), 0.1, training=False) @ v


def fused(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask > 0)


def scores_returned(q, k, v, mask):
    scores = q @ k.transpose(-1, -2) + mask
    return scores.softmax(-1) @ v, scores


def softmax_over_heads(q, k, v, mask):
    return (q @ k.transpose(-1, -2) + mask).softmax(1) @ v


class Layers(nn.Module):
    """Two layers of attention over one mask."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.out = nn.ModuleList(nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(2))

    def forward(self, x, mask):
        more = ()
        for out in self.out:
            heads = x.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)
            found = self.attention(heads, heads * 0.5, heads, mask)
            attended, *more = found if isinstance(found, tuple) else (found,)
            x = x + out(attended.transpose(1, 2).flatten(2))
        return (x, *more)


def inputs(length, batch=1, mask=(1, 1, 1, None)):
    torch.manual_seed(length)
    shape = [length if size is None else size for size in mask]
    return torch.randn(batch, length, HEADS * WIDTH), (torch.rand(shape) > 0.2).float().index_fill(
        -1, torch.tensor(0), 1
    )


def captured(attention, *, batch=1, mask=(1, 1, 1, None)):
    shapes = ({1: LENGTH}, {place: LENGTH for place, size in enumerate(mask) if size is None})
    torch.manual_seed(0)
    return quant2e.capture(Layers(attention).eval(), inputs(8, batch, mask), dynamic_shapes=shapes), shapes


@pytest.mark.parametrize(
    ("batch", "mask"),
    [
        (1, (1, 1, 1, None)),
        (1, (1, 1, None, None)),
        (3, (3, 1, 1, None)),
        (3, (3, HEADS, None, None)),
        (2, (None, None)),
    ],
)
def test_scores_stay_in_three_dimensions(batch, mask):
    graph, _ = captured(spelled_out, batch=batch, mask=mask)
    wanted = [graph(*inputs(length, batch, mask)) for length in (2, 8, 31)]
    assert batched_matmul(graph) == 4
    assert scores_in_three_dimensions(graph) == 2
    graph.graph.lint()
    graph.recompile()
    for length, (x,) in zip((2, 8, 31), wanted, strict=True):
        torch.testing.assert_close(graph(*inputs(length, batch, mask))[0], x, atol=1e-6, rtol=1e-5)
    views = torch.ops.aten.reshape.default
    assert all(len(n.meta["val"].shape) == 3 for n in graph.graph.nodes if n.target is torch.ops.aten.softmax.int)
    assert sum(n.target is views and n.args[0].target is torch.ops.aten.softmax.int for n in graph.graph.nodes) == 0


@pytest.mark.parametrize(("attention", "changed"), [(scores_returned, 1), (softmax_over_heads, 0)])
def test_what_needs_four_dimensions_keeps_them(attention, changed):
    """Of the two layers, only the last one's scores are returned."""
    graph, _ = captured(attention)
    batched_matmul(graph)
    assert scores_in_three_dimensions(graph) == changed


def test_sizes_that_do_not_vary_are_left():
    graph = quant2e.capture(Layers(spelled_out).eval(), inputs(8))
    batched_matmul(graph)
    assert scores_in_three_dimensions(graph) == 0


@pytest.mark.slow
@pytest.mark.parametrize("attention", [spelled_out, fused])
def test_one_delegate_that_runs_at_every_length(attention):
    graph, shapes = captured(attention)
    program = to_executorch(graph, inputs(8), dynamic_shapes=shapes, verify_inputs=[inputs(2), inputs(31)])
    assert len(program.report.partitions) == 1, program.report
    for length in (2, 17, 32):
        torch.testing.assert_close(program(*inputs(length))[0], graph(*inputs(length))[0], atol=1e-4, rtol=1e-4)
