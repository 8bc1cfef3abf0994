"""Operands by schema name and place, read and set, wherever they are spelled."""

import operator

import pytest
import torch
from torch.fx import Graph

from quant2e.graph.dataflow import is_pointwise, literal, operand, operands, readers, set_operand

aten = torch.ops.aten


def _call(target, args, kwargs=None):
    """A call whose operands ``"x"``, ``"y"`` … are placeholders of the same graph."""
    graph = Graph()
    names = dict.fromkeys(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, str))
    inputs = {name: graph.placeholder(name) for name in names}
    return graph.call_function(
        target, tuple(inputs.get(a, a) if isinstance(a, str) else a for a in args), dict(kwargs or {})
    )


# name and place of the same operand, and what it is
READ = {
    "positional": (aten.sub.Tensor, ("x", 2), {}, ("other", 1), 2),
    "keyword": (aten.sub.Tensor, ("x",), {"other": 2}, ("other", 1), 2),
    "default": (aten.conv2d.default, ("x", "w"), {}, ("groups", 6), 1),
    "default that is a list": (aten.conv2d.default, ("x", "w"), {}, ("stride", 3), [1, 1]),
    "default None": (aten.conv2d.default, ("x", "w"), {}, ("bias", 2), None),
    "keyword-only": (aten.sub.Tensor, ("x", 2), {"alpha": 3}, ("alpha", 2), 3),
    "keyword-only default": (aten.sub.Tensor, ("x", 2), {}, ("alpha", 2), 1),
    "given as None": (aten.clamp.default, ("x", None, 6.0), {}, ("min", 1), None),
    "false, not missing": (aten.dropout.default, ("x", 0.0, False), {}, ("train", 2), False),
    "missing without default": (aten.dropout.default, ("x",), {}, ("train", 2), "the default"),
    "no such operand": (aten.relu.default, ("x",), {}, ("alpha", 1), "the default"),
    "no schema, positional": (operator.getitem, ("x", 1), {}, (1,), 1),
    "no schema, keyword": (torch.sum, ("x",), {"dim": 0}, ("dim",), 0),
    "no schema, missing": (operator.getitem, ("x",), {}, (1, "dim"), "the default"),
}


@pytest.mark.parametrize("case", READ)
def test_read(case):
    target, args, kwargs, names, value = READ[case]
    node = _call(target, args, kwargs)
    assert [operand(node, name, "the default") for name in names] == [value] * len(names)
    without = None if value == "the default" else value
    assert [operand(node, name) for name in names] == [without] * len(names)


def test_nodes_are_operands():
    node = _call(aten.conv2d.default, ("x", "w"))
    x, w = node.all_input_nodes
    assert operands(node) == {
        "input": x, "weight": w, "bias": None, "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1
    }  # fmt: skip
    assert operands(_call(operator.getitem, ("x", 1))) == {}
    plain = _call(aten.sub.Tensor, ("x",), {"alpha": 2, "other": 1})
    assert operands(plain) == {"self": plain.args[0], "other": 1, "alpha": 2}


@pytest.mark.parametrize(
    ("name", "value"), [("input", None), (1, None), ("stride", [2, 2]), ("groups", 1), ("padding", None)]
)
def test_literals(name, value):
    node = _call(aten.conv2d.default, ("x", "w", None, [2, 2]))
    with node.graph.inserting_before(node):
        size = node.graph.call_function(aten.sym_size.int, (node.args[0], 0))
    node.update_kwarg("padding", [1, size])
    assert literal(node, name) == value


SET = {
    "where it was spelled": (("x", "w", None, [2, 2]), {}, "stride", [3, 3], ((None, [3, 3]), {})),
    "keyword stays": (("x", "w"), {"stride": [2, 2]}, "stride", [3, 3], ((), {"stride": [3, 3]})),
    "the next place": (("x", "w"), {}, "bias", 0.0, ((0.0,), {})),
    "beyond": (("x", "w"), {}, "groups", 2, ((None, [1, 1], [0, 0], [1, 1], 2), {})),
    "beyond a keyword": (("x", "w"), {"padding": [1, 1]}, "groups", 2, ((), {"padding": [1, 1], "groups": 2})),
    "beyond what is missing": (("x",), {"bias": None}, "stride", [2, 2], ((), {"bias": None, "stride": [2, 2]})),
    "a default in the middle": (("x", "w", 0.0, [2, 2]), {}, "bias", None, ((None, [2, 2]), {})),
    "a default at the end": (("x", "w", 0.0), {}, "bias", None, ((), {})),
    "defaults at the end": (("x", "w", None, [1, 1], [0, 0], (1, 1), 2), {}, "groups", 1, ((), {})),
    "a default that is not spelled": (("x", "w"), {}, "bias", None, ((), {})),
    "a keyword becomes the default": (("x", "w"), {"groups": 2}, "groups", 1, ((), {})),
    "a number of another kind": (("x", "w"), {"groups": 2}, "groups", True, ((), {"groups": True})),
}
"""Operands of a conv2d and what is set → what is spelled behind the first two."""


@pytest.mark.parametrize("case", SET)
def test_set(case):
    args, kwargs, name, value, spelled = SET[case]
    node = _call(aten.conv2d.default, args, kwargs)
    set_operand(node, name, value)
    assert (node.args[2:], node.kwargs) == spelled
    assert operand(node, name) == value


@pytest.mark.parametrize("alpha", [1, 2])
def test_set_keyword_only(alpha):
    node = _call(aten.sub.Tensor, ("x", "y"), {"alpha": 3})
    set_operand(node, "alpha", alpha)
    assert (len(node.args), node.kwargs) == (2, {} if alpha == 1 else {"alpha": 2})


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((None, 0.1), {}), ((None, 0.1, True), {}), (("m",), {"scale": 2.0})],
)
def test_set_there_and_back(args, kwargs):
    node = _call(aten.scaled_dot_product_attention.default, ("q", "k", "v", *args), kwargs)
    before, probability = (node.args, node.kwargs), operand(node, "dropout_p")
    for value in (0.5, 0.0, 0.2, probability):
        set_operand(node, "dropout_p", value)
        assert operand(node, "dropout_p") == value
    assert (node.args, node.kwargs) == before


def test_a_node_is_set():
    node = _call(aten.conv2d.default, ("x", "w"))
    x = node.all_input_nodes[0]
    set_operand(node, "weight", x)
    set_operand(node, "bias", x)
    assert node.args == (x, x, x)
    assert len(x.users) == 1


@pytest.mark.parametrize(("target", "name"), [(aten.relu.default, "alpha"), (operator.getitem, "index")])
def test_nothing_to_set(target, name):
    with pytest.raises(ValueError, match=f"no operand '{name}'"):
        set_operand(_call(target, ("x",)), name, 1)


def test_readers():
    graph = Graph()
    x = graph.placeholder("x")
    split = graph.call_function(aten.split.Tensor, (x, 1))
    first, second = (graph.call_function(operator.getitem, (split, i)) for i in range(2))
    total, end = graph.call_function(aten.add.Tensor, (first, second)), graph.output(first)
    assert list(readers(split, lambda node: False)) == [first, second]
    assert list(readers(split, lambda node: node.target is operator.getitem)) == [total, end, total]


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (torch.sigmoid, True),
        (lambda x: x * x, True),
        (torch.nn.functional.relu6, True),
        (lambda x: torch.nn.functional.relu6(x.neg(), inplace=True), True),
        (lambda x: torch.nn.functional.hardswish(x.neg(), inplace=True), True),
        (lambda x: x.double(), True),
        (lambda x: x.softmax(-1), False),
        (lambda x: x.sum(), False),
        (lambda x: x.t(), False),
    ],
)
def test_whether_each_value_depends_on_one(function, answer):
    class Model(torch.nn.Module):
        def forward(self, x):
            return function(x)

    graph = torch.export.export(Model(), (torch.randn(3, 3),), strict=False).module().graph
    *_, last = (node for node in graph.nodes if node.op == "call_function")
    assert is_pointwise(last) is answer
