"""What nodes do besides returning a value."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant2e.graph.captured.capture import capture
from quant2e.graph.dataflow import operand
from quant2e.graph.effects import aliases, is_deterministic, is_in_place, is_random, is_view, trains, writes


class One(nn.Module):
    """A model from one function of an input ``x`` and a buffer ``b``."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("b", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(SimpleNamespace(x=x, b=self.b))


TABLE = {
    "add": (lambda t: t.x + t.b, [], [], False, True),
    "in place": (lambda t: t.b.add_(t.x), ["b"], ["b"], False, True),
    "copy": (lambda t: t.b.copy_(t.x), ["b"], ["b"], False, True),
    "relu_": (lambda t: F.relu_(t.x), ["x"], ["x"], False, True),
    "random in place": (lambda t: t.b.bernoulli_(), ["b"], ["b"], True, False),
    "view": (lambda t: t.b.view(3, 1), [], ["b"], False, True),
    "transpose": (lambda t: t.b.expand(3, 3), [], ["b"], False, True),
    "dropout": (lambda t: F.dropout(t.x, 0.5, True), [], ["x"], True, False),
    "dropout in eval": (lambda t: F.dropout(t.x, 0.5, False), [], ["x"], False, True),
    "random": (lambda _: torch.rand(3), [], [], True, False),
    "random like": (lambda t: torch.randn_like(t.x), [], [], True, False),
    "uninitialised": (lambda _: torch.empty(3), [], [], False, False),
    "arange": (lambda _: torch.arange(3), [], [], False, True),
}
TABLE["norm in training"] = (
    lambda t: F.batch_norm(t.x, t.b, t.b, training=True),
    ["b", "b"],
    [],
    False,
    True,
)


@pytest.mark.parametrize(("body", "written", "shared", "random", "deterministic"), TABLE.values(), ids=TABLE)
def test_effects(body, written, shared, random, deterministic):
    x = torch.ones(2, 3) if body is TABLE["norm in training"][0] else torch.ones(3)
    gm = capture(One(body), x)
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert [n.name for n in writes(node)] == written
    assert [n.name for n in aliases(node)] == shared
    assert is_random(node) is random
    assert is_deterministic(node) is deterministic


def test_arguments_by_name_wherever_they_are():
    gm = capture(One(lambda t: F.layer_norm(t.x, [3], t.b)), torch.ones(2, 3))
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert operand(node, "normalized_shape") == [3]
    assert operand(node, "weight").name == "b"
    assert operand(node, "eps") == 1e-5
    assert operand(node, "absent", "default") == "default"
    node.args, node.kwargs = node.args[:2], {"weight": node.args[2]}
    assert operand(node, "weight").name == "b"


def test_attention_with_dropout_trains():
    gm = capture(One(lambda t: F.scaled_dot_product_attention(t.x, t.x, t.x, dropout_p=0.1)), torch.ones(1, 2, 3, 4))
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert trains(node)
    assert is_random(node)
    node.args = node.args[:4]
    assert not trains(node)
    assert is_deterministic(node)


def several(t: SimpleNamespace) -> tuple[Tensor, ...]:
    made = torch.tensor([1.0])  # exported with a `detach_`
    return t.b.view(3, 1), t.b.half(), F.dropout(t.b, training=False), t.x.type_as(t.b), t.b.add_(1), made, t.x + 1


def test_views_and_ops_in_place():
    calls = [n for n in capture(One(several), torch.ones(3)).graph.nodes if n.op == "call_function"]
    names = {n.name: n.target._schema.name.removeprefix("aten::") for n in calls}
    assert {names[n.name] for n in calls if is_view(n)} == {"view", "to", "dropout", "type_as"}
    assert {names[n.name] for n in calls if is_in_place(n)} == {"add_", "detach_"}
