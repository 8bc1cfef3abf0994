"""In-place ops as functions: which become one, and which must write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quant2e.graph.captured.capture import capture
from quant2e.integer.functionalize import exposed, use_functional_ops


class One(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.body(x)


# body → the in-place ops that are left, and what they write to
TABLE = {
    "two in a row": (lambda x: (x * 2).relu_().add_(1), [], set()),
    "through a view": (lambda x: (x * 2).view(4).relu_(), [], set()),
    "a view is read": (lambda x: (lambda y: (y.view(4), y.relu_()))(x * 2), ["relu_"], {"mul", "view"}),
    "an input": (lambda x: x.relu_() + 1, ["relu_"], {"x"}),
    "of another dtype": (lambda x: (x * 2).add_(x.double()) + 1, ["add_"], {"mul"}),
    "a list": (lambda x: (lambda y: (torch._foreach_mul_([y], 3.0), y)[1])(x * 2), ["_foreach_mul_"], {"mul"}),
    "an input, twice": (lambda x: x.relu_().add_(1), ["relu_", "add_"], {"x"}),
}


@pytest.mark.parametrize(("body", "left", "written"), TABLE.values(), ids=TABLE)
def test_what_becomes_a_function(body, left, written):
    gm, x = capture(One(body), torch.ones(2, 2)), torch.tensor([[-1.0, 2.0], [3.0, -4.0]])
    expected, seen = gm(x.clone()), x.clone()
    gm(seen)
    use_functional_ops(gm)
    gm.recompile()
    names = [n.name for n in gm.graph.nodes if n.op == "call_function" and n.target._schema.is_mutable]
    assert names == left
    assert {n.name for n in exposed(gm)} == written
    given = x.clone()
    assert all(map(torch.equal, torch.utils._pytree.tree_leaves(gm(given)), torch.utils._pytree.tree_leaves(expected)))
    assert torch.equal(given, seen)
