"""Dead code and unused tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant2e.graph.captured.capture import capture
from quant2e.passes import run
from quant2e.passes.dead_code import prune_unused_attributes, remove_dead_code


class Littered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("spare", torch.zeros(1), persistent=False)
        self.table = torch.ones(3)

    def forward(self, x: Tensor, ignored: Tensor) -> Tensor:
        self.count.add_(1)
        self.unused(x).relu() + self.table + self.spare
        torch.rand(3)
        torch._check(x.shape[0] > 0)
        return self.used(x)


def test_removes_what_has_no_effect_and_keeps_what_has():
    x, model = torch.randn(2, 3), Littered().eval()
    gm = capture(model, (x, x), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}, "ignored": None})
    assert run(gm, (remove_dead_code, prune_unused_attributes))
    assert [n.name for n in gm.graph.nodes if n.op == "placeholder"] == ["x", "ignored"]
    ops = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    assert ops[0] == "aten.add_.Tensor"
    assert {"aten.rand.default", "aten.linear.default"} <= set(ops)
    assert ops.count("aten.linear.default") == 1
    assert not {"aten.relu.default", "aten.add.Tensor"} & set(ops)
    assert list(gm.state_dict()) == ["count", "used.weight", "used.bias"]
    assert [n for n, _ in gm.named_modules()] == ["", "used"]
    assert not hasattr(gm, "table")
    assert torch.equal(gm(x, x), model.used(x))
    assert gm.count == 1
    assert not run(gm, (remove_dead_code, prune_unused_attributes))
    assert len(model.state_dict()) == 10


def test_bodies_of_control_flow_are_cleaned_and_kept():
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def then(x: Tensor) -> Tensor:
                x.exp()
                return x + 1

            torch.cond(x.sum() > 1, lambda x: x * 2, lambda x: x * 3, (x,))
            return torch.cond(x.sum() > 0, then, lambda x: x - 1, (x,))

    x = torch.ones(3)
    gm = capture(Branch(), x)
    run(gm, (remove_dead_code, prune_unused_attributes))
    bodies = [m for n, m in gm.named_modules() if n]
    assert len(bodies) == 2
    assert "exp" not in "".join(m.code for m in bodies)
    assert torch.equal(gm(x), x + 1)
    assert torch.equal(gm(-x), -x - 1)


def test_a_write_that_nobody_sees_is_no_effect_and_neither_is_idle_dropout():
    class Idle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            (x * 2).relu_().add_(1)
            # Of a value of its own: torch 2.14 hands idle dropout of x on to what reads x later.
            nn.functional.dropout(x + 1, 0.5, training=False)
            y = x * 3
            y[0].zero_()
            return nn.functional.dropout(y, 0.5, training=False)

    gm = capture(Idle(), torch.ones(2, 3))
    assert run(gm, (remove_dead_code,))
    ops = [n.target._schema.name for n in gm.graph.nodes if n.op == "call_function"]
    assert ops == ["aten::mul", "aten::select", "aten::zero_", "aten::dropout"]
