"""Selections: from which tensors an op is reached that may take a far value for "never"."""

import math

import pytest
import torch
from torch import nn

from quant2e.graph.captured.capture import capture
from quant2e.graph.selections import PICKED, WEIGHED, marks

OUT = {-1: math.inf, 1: math.inf}
SOFT = {-1: WEIGHED}
CASES = {
    "softmax": (lambda x, m, b: (x + m).softmax(-1), {-1: WEIGHED}),
    "through movement and casts": (
        lambda x, m, b: (x + m[:, None].expand(2, 2, 4).double().float().transpose(0, 1)).softmax(-1),
        {-1: WEIGHED},
    ),
    "subtracted": (lambda x, m, b: (x - m).log_softmax(-1), {1: WEIGHED}),
    "negated": (lambda x, m, b: (x + -m).softmax(-1), {1: WEIGHED}),
    "scaled down": (lambda x, m, b: (x + m * -2.0).softmax(-1), {1: WEIGHED}),
    "scaled up": (lambda x, m, b: (x + m / 2.0).softmax(-1), {-1: WEIGHED}),
    "scaled by data": (lambda x, m, b: (x * m).softmax(-1), {-1: WEIGHED, 1: WEIGHED}),
    "joined": (lambda x, m, b: torch.cat([x, m]).softmax(-1), {-1: WEIGHED}),
    "a maximum": (lambda x, m, b: m.amax(-1) @ torch.ones(2), {-1: PICKED}),
    "a minimum": (lambda x, m, b: m.amin(-1) @ torch.ones(2), {1: PICKED}),
    "sorted": (lambda x, m, b: m.topk(2)[1], {-1: PICKED, 1: PICKED}),
    "chosen": (lambda x, m, b: torch.where(b, x, m) @ torch.ones(4), {-1: PICKED, 1: PICKED}),
    "compared": (lambda x, m, b: m > 0, {-1: PICKED, 1: PICKED}),
    "attention": (
        lambda x, m, b: nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=m @ m.T) @ torch.ones(4),
        None,
    ),
    "returned": (lambda x, m, b: x + m, OUT),
    "behind a product": (lambda x, m, b: (m @ torch.ones(4, 4)).softmax(-1), None),
    "multiplied after": (lambda x, m, b: x.softmax(-1) @ m.T @ torch.ones(2), None),
}


@pytest.mark.parametrize("case", CASES)
def test_marks(case):
    function, wanted = CASES[case]

    class Model(nn.Module):
        def forward(self, x, m, b):
            return function(x, m, b)

    gm = capture(Model().eval(), (torch.randn(2, 4), torch.randn(2, 4), torch.rand(2, 4) > 0.5))
    found = {node.name: asked for node, asked in marks(gm.graph).items()}
    assert found.get("m") == wanted


def test_the_mask_of_attention():
    class Model(nn.Module):
        def forward(self, q, m):
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=m)

    gm = capture(Model().eval(), (torch.randn(1, 2, 4), torch.zeros(2, 2)))
    found = {node.name: asked for node, asked in marks(gm.graph).items()}
    assert found["m"] == SOFT
    assert "q" not in found
