"""Constant nodes and their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant2e.errors import PassError
from quant2e.graph.captured.capture import capture
from quant2e.graph.constants import Cause, Constants, evaluate


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
    return {node.name for node in Constants(gm.graph)}


def test_constants_of_a_model_that_writes_buffers():
    gm = capture(Mixed().eval(), torch.randn(2, 3))
    found = names(gm)
    assert {"linear_weight", "linear_bias", "t", "mul", "matmul", "arange", "norm_running_mean", "dropout"} <= found
    assert {"zeros", "add__2"} <= found  # nobody but the reader of the sum sees what is written
    for buffer in ("count", "history"):
        assert buffer not in found
    written = {
        "add_",
        "add__1",
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
    assert len(list(Constants(gm.graph))) == 5001
    assert evaluate(gm, node) == 1


class Weights(nn.Module):
    """A linear whose weight one function makes of a parameter ``w`` and buffers ``b`` and ``u``, a view of ``b``."""

    def __init__(self, weight) -> None:
        super().__init__()
        self.weight = weight
        self.w = nn.Parameter(torch.eye(3))
        self.register_buffer("b", torch.eye(3))
        self.register_buffer("u", self.b.view(9))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))
        self.tied = self.w

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(self, x))


def after(value, *_) -> Tensor:
    """The first of several values: the others are computed for what they write."""
    return value


def normed(m: Weights, training: bool) -> Tensor:
    return F.batch_norm(m.w, m.mean, m.var, training=training)


VARYING = {
    "a parameter": (lambda m, _: m.w, None),
    "tied": (lambda m, _: m.tied * m.w, None),
    "detached": (lambda m, _: m.w.detach(), None),
    "an alias": (lambda m, _: torch.ops.aten.alias(m.w), None),
    "views of views": (lambda m, _: m.w.t().reshape(9).view(3, 3), None),
    "dropout in evaluation": (lambda m, _: F.dropout(m.w, training=False), None),
    "dropout with probability 0": (lambda m, _: F.dropout(m.w, 0.0, training=True), None),
    "dropout in training": (lambda m, _: F.dropout(m.w, training=True), ("dropout", Cause.VARIES)),
    "a norm in evaluation": (lambda m, _: normed(m, False), None),
    "a norm in training": (lambda m, _: normed(m, True), ("batch_norm", Cause.WRITES_BUFFER)),
    "statistics that a norm trains": (lambda m, _: after(m.w * m.mean, normed(m, True)),
        ("batch_norm", Cause.WRITES_BUFFER)),
    "a buffer that is written": (lambda m, _: m.b.add_(1), ("add_", Cause.WRITES_BUFFER)),
    "through a view": (lambda m, _: after(m.b, m.b[0].add_(1)), ("add_", Cause.WRITES_BUFFER)),
    "through a view of a view": (lambda m, _: after(m.b, m.b.view(9)[2:5].zero_()), ("zero_", Cause.WRITES_BUFFER)),
    "under a second name": (lambda m, _: after(m.b, m.u.add_(1)), ("add_", Cause.WRITES_BUFFER)),
    "under a second name, through a view": (lambda m, _: after(m.b * 2, m.u[1:3].add_(1)),
        ("add_", Cause.WRITES_BUFFER)),
    "afterwards": (lambda m, _: (lambda y: after(y, m.b.add_(1)))(m.b * 2), ("add_", Cause.WRITES_BUFFER)),
    "with data": (lambda m, x: after(m.b, m.b[0].copy_(x[0])), ("copy_", Cause.WRITES_BUFFER)),
    "another buffer is written": (lambda m, _: after(m.w, m.b.add_(1)), None),
    "in place, to memory of its own": (lambda m, _: m.w.clone().mul_(2), None),
    "so, twice": (lambda m, _: m.w.clone().mul_(2).add_(1), None),
    "so, through a view": (lambda m, _: m.w.clone().t().mul_(2), None),
    "so, and read under the old name": (lambda m, _: (lambda c: after(c, c[0].mul_(2)))(m.w.clone()),
        ("mul_", Cause.WRITES_TENSOR)),
    "so, with data": (lambda m, x: m.w.clone().mul_(x[0]), ("x", Cause.INPUT)),
    "so, at random": (lambda m, _: m.w.clone().bernoulli_(), ("bernoulli_", Cause.VARIES)),
    "uninitialised": (lambda *_: torch.empty(3, 3), ("empty", Cause.VARIES)),
    "uninitialised like a parameter": (lambda m, _: torch.empty_like(m.w), ("empty_like", Cause.VARIES)),
    "random": (lambda m, _: m.w + torch.rand(3, 3), ("rand", Cause.VARIES)),
    "random like a parameter": (lambda m, _: torch.randn_like(m.w), ("randn_like", Cause.VARIES)),
    "an input": (lambda m, x: m.w * x[0], ("x", Cause.INPUT)),
    "control flow": (
        lambda m, _: torch.cond(m.w.sum() > 0, lambda w: w * 2, lambda w: w * 3, (m.w,)),
        ("cond", Cause.CONTROL_FLOW),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("weight", "expected"), VARYING.values(), ids=VARYING)
def test_why_a_weight_is_not_constant(weight, expected):
    model, x = Weights(weight).eval(), torch.arange(6.0).view(2, 3)
    gm = capture(model, x)
    linear = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    source, constants = linear.args[1], Constants(gm.graph)
    variation = constants.variation(source)
    assert (source in constants) is (variation is None)
    assert (None if variation is None else (variation.node.name, variation.cause)) == expected
    if variation is None:
        value = evaluate(gm, source).clone()
        assert torch.equal(value, evaluate(gm, source))  # nothing was written
        assert torch.equal(F.linear(x, value), gm(x))


def test_the_reason_in_words():
    gm = capture(Weights(lambda m, x: after(m.b, m.b[0].add_(1))).eval(), torch.ones(2, 3))
    nodes = {n.name: n for n in gm.graph.nodes}
    constants = Constants(gm.graph)
    assert str(constants.variation(nodes["x"])) == "it depends on the input 'x'"
    words = str(constants.variation(nodes["b"]))
    assert words.startswith("it depends on 'add_' (aten.add_.Tensor)")
    assert words.endswith(", which changes a buffer")


def test_nodes_that_a_rewrite_adds_can_be_asked_for():
    gm = capture(Weights(lambda m, x: after(m.b, m.b[0].add_(1))).eval(), torch.ones(2, 3))
    nodes = {n.name: n for n in gm.graph.nodes}
    constants = Constants(gm.graph)
    with gm.graph.inserting_before(nodes["linear"]):
        parameter = gm.graph.get_attr("w")
        added = [gm.graph.call_function(torch.ops.aten.t.default, (n,)) for n in (parameter, nodes["b"], nodes["x"])]
    assert [node in constants for node in added] == [True, False, False]
    assert constants.variation(added[1]).node is nodes["add_"]


def test_a_buffer_that_a_branch_writes_is_not_constant():
    """``torch.export`` refuses such branches today; other programs have them."""
    body = torch.fx.Graph()
    body.output((body.call_function(torch.ops.aten.add_.Tensor, (body.placeholder("b"), 1)),))
    graph = torch.fx.Graph()
    x, b, w = graph.placeholder("x"), graph.get_attr("b"), graph.get_attr("w")
    read = graph.call_function(torch.ops.aten.mul.Tensor, (b, 2))
    other = graph.call_function(torch.ops.aten.mul.Tensor, (w, 2))
    bodies = [graph.get_attr("body"), graph.get_attr("body")]
    cond = graph.call_function(torch.ops.higher_order.cond, (x, *bodies, (b,)))
    graph.output((cond, read, other))
    parts = {"b": torch.ones(2), "w": torch.ones(2), "body": torch.fx.GraphModule({}, body)}
    constants = Constants(torch.fx.GraphModule(parts, graph).graph)
    assert str(constants.variation(read)) == "it depends on 'cond' (cond), which changes a buffer"
    assert constants.variation(b).cause is Cause.WRITES_BUFFER
    assert other in constants


def test_a_graph_without_a_module_has_constants_too():
    graph = torch.fx.Graph()
    w, again, b = graph.get_attr("w"), graph.get_attr("w"), graph.get_attr("b")
    graph.call_function(torch.ops.aten.add_.Tensor, (again, b))
    assert [node in Constants(graph) for node in (w, again, b)] == [False, False, True]
