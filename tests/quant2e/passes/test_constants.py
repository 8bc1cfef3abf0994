"""Constant nodes and their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant2e.errors import PassError
from quant2e.graph.capture import capture
from quant2e.graph.constants import constant_nodes, evaluate


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("history", torch.zeros(2, 3))
        self.alias = self.count
        self.norm = nn.BatchNorm1d(3)
        self.table = torch.eye(3)

    def forward(self, x: Tensor) -> Tensor:
        self.history[0].add_(1)
        self.count += 1
        weight = self.linear.weight.t() * torch.tensor([1.0, 2.0, 3.0]) @ self.table
        scratch = torch.zeros(3).add_(1)
        dropped = F.dropout(self.linear.bias, 0.5, self.training)
        y = torch.relu_(x @ weight) + self.alias + self.history.sum(0) + scratch + dropped
        return self.norm(y) + torch.arange(3) + torch.rand(3) + torch.empty(3).zero_()


def names(gm: torch.fx.GraphModule) -> set[str]:
    return {node.name for node in constant_nodes(gm.graph)}


def test_constants_of_a_model_that_writes_buffers():
    gm = capture(Mixed().eval(), torch.randn(2, 3))
    found = names(gm)
    assert {"linear_weight", "linear_bias", "t", "mul", "matmul", "arange", "norm_running_mean", "dropout"} <= found
    for buffer in ("count", "history"):
        assert buffer not in found
    written = {
        "zeros",
        "add_",
        "relu_",
        "rand",
        "empty",
        "zero_",
        "matmul_1",
        "batch_norm",
        "sum_1",
        "select",
        "output",
        "x",
    }
    assert not written & found


def test_training_makes_statistics_and_dropout_variable():
    found = names(capture(Mixed().train(), torch.randn(2, 3)))
    assert not {"norm_running_mean", "norm_running_var", "norm_num_batches_tracked", "dropout"} & found
    assert {"norm_weight", "norm_bias", "linear_weight"} <= found


def test_a_write_through_a_second_name_counts():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.zeros(4))
            self.register_buffer("b", self.a.view(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            self.b.add_(1)
            return x + self.a

    assert names(capture(Twice(), torch.randn(4))) == set()


def test_control_flow_and_modules_are_not_constant():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda w: w * 2, lambda w: w * 3, (self.linear.weight,)) + x

    found = names(capture(Branch(), torch.ones(3, 3)))
    assert found == {"linear_weight", "linear_bias"}


def evaluated(gm: torch.fx.GraphModule, name: str, values: dict[Any, Any] | None = None) -> Any:
    return evaluate(gm, next(n for n in gm.graph.nodes if n.name == name), values)


def test_evaluates_without_gradient_or_random_numbers():
    model = Mixed().eval()
    gm, state = capture(model, torch.randn(2, 3)), torch.get_rng_state()
    values: dict[Any, Any] = {}
    expected = (model.linear.weight.t() * torch.tensor([1.0, 2.0, 3.0]) @ model.table).detach()
    assert torch.equal(evaluated(gm, "matmul", values), expected)
    assert not evaluated(gm, "matmul").requires_grad
    assert evaluated(gm, "matmul", values) is evaluated(gm, "matmul", values)
    assert evaluated(gm, "linear_weight") is model.linear.weight
    assert torch.equal(evaluated(gm, "arange"), torch.arange(3))
    assert torch.equal(state, torch.get_rng_state())
    assert model.count.sum() == 0


@pytest.mark.parametrize(
    ("name", "culprit"), [("rand", "rand"), ("x", "x"), ("batch_norm", "select|x|add_|rand|zeros")]
)
def test_what_is_not_constant_has_no_value(name, culprit):
    gm = capture(Mixed().eval(), torch.randn(2, 3))
    with pytest.raises(PassError, match=rf"'({culprit})\w*' .*is not constant, so the value of '{name}'"):
        evaluated(gm, name)


def test_long_chains_do_not_recurse():
    graph = torch.fx.Graph()
    node = graph.get_attr("w")
    for _ in range(5000):
        node = graph.call_function(torch.ops.aten.neg.default, (node,))
    graph.output(node)
    gm = torch.fx.GraphModule({"w": torch.ones(1)}, graph)
    assert len(constant_nodes(gm.graph)) == 5001
    assert evaluate(gm, node) == 1
