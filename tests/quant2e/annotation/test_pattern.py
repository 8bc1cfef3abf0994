"""Patterns: what they match, what they refuse, and why."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quant2e.annotation.pattern import Arg, Match, constant, explain, find, match, op, solutions
from quant2e.errors import AnnotationError

aten = torch.ops.aten
x, y, b = Arg("x"), Arg("y"), Arg("b", optional=True)
w = constant("w")
conv = op(aten.conv2d.default)(x, w, b)
linear = op(aten.linear.default)(x, w, bias=b)
mac = op(aten.conv2d.default, aten.linear.default)(x, w, bias=b)
add = op(aten.add.Tensor)
relu = op(aten.relu.default)
clamp = op(aten.relu.default, aten.hardtanh.default)


class Of(nn.Module):
    """A function of one input, with a conv, a linear and a buffer to use."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4, 4))
        self.function = function

    def forward(self, i):
        return self.function(self, i)


IMAGE, ROW = torch.randn(1, 3, 4, 4), torch.randn(2, 4)


def graph_of(function, example):
    return torch.export.export(Of(function).eval(), (example,)).module().graph


def node(graph, name):
    return next(n for n in graph.nodes if n.name == name)


def text(m: Match) -> str:
    edges = ", ".join(f"{k}={'+'.join(p.name + '>' + c.name for p, c in es)}" for k, es in m.operands.items())
    return f"{' '.join(n.name for n in m.nodes)}: {edges}"


def found(pattern, graph) -> list[str]:
    return [text(m) for m in find(pattern, graph)]


@pytest.mark.parametrize(
    ("function", "pattern", "expected"),
    [
        (lambda m, i: m.conv(i), conv, ["conv2d: x=i>conv2d, w=conv_weight>conv2d, b=conv_bias>conv2d"]),
        (lambda m, i: F.conv2d(i, m.conv.weight), conv, ["conv2d: x=i>conv2d, w=conv_weight>conv2d"]),
        (
            lambda m, i: F.relu(m.conv(i)),
            relu(conv) | conv,
            ["conv2d relu: x=i>conv2d, w=conv_weight>conv2d, b=conv_bias>conv2d"],
        ),
        (
            lambda m, i: m.conv(i).relu_(),
            relu(conv) | conv,
            ["conv2d relu_: x=i>conv2d, w=conv_weight>conv2d, b=conv_bias>conv2d"],
        ),
        # the convolution is used twice, so only the relu can be alone
        (
            lambda m, i: (lambda c: F.relu(c) * c)(m.conv(i)),
            relu(conv) | conv,
            ["conv2d: x=i>conv2d, w=conv_weight>conv2d, b=conv_bias>conv2d"],
        ),
        # the weight may pass through views, but may not depend on the input
        (
            lambda m, i: F.conv2d(i, m.conv.weight.transpose(0, 1)),
            conv,
            ["conv2d: x=i>conv2d, w=transpose>conv2d"],
        ),
        (lambda m, i: F.conv2d(i, m.conv.weight * i.mean()), conv, []),
        # residual: the convolution on either side
        (
            lambda m, i: m.conv(i) + i,
            add([conv, y]),
            ["conv2d add: x=i>conv2d, w=conv_weight>conv2d, b=conv_bias>conv2d, y=i>add"],
        ),
        (
            lambda m, i: i + m.conv(i),
            add([conv, y]),
            ["conv2d add: y=i>add, x=i>conv2d, w=conv_weight>conv2d, b=conv_bias>conv2d"],
        ),
        # one tensor in two slots is one producer, used twice
        (lambda m, i: i + i, add(x, y), ["add: x=i>add, y=i>add"]),
        (lambda m, i: (lambda c: c + c)(m.conv(i)), add([conv, y]), []),
        (lambda m, i: i + i, add(x, x), ["add: x=i>add+i>add"]),
        (lambda m, i: i + i.relu(), add(x, x), []),
        (
            lambda m, i: i * torch.sigmoid(i),
            op(aten.mul.Tensor)([x, op(aten.sigmoid.default)(x)]),
            ["sigmoid mul: x=i>mul+i>sigmoid"],
        ),
        # literals are not operands
        (lambda m, i: i + 1, add(x, y), []),
        (lambda m, i: i + 1, add(x), ["add: x=i>add"]),
        # a list of tensors binds them all
        (
            lambda m, i: torch.cat([i, i.relu(), i]),
            op(aten.cat.default)(x),
            ["cat: x=i>cat+relu>cat+i>cat"],
        ),
    ],
)
def test_find(function, pattern, expected):
    assert found(pattern, graph_of(function, IMAGE)) == expected


def test_keyword_operands_are_operands():
    graph = graph_of(lambda m, i: F.linear(i, weight=m.linear.weight, bias=m.linear.bias), ROW)
    target = node(graph, "linear")
    expected = "linear: x=i>linear, w=linear_weight>linear, b=linear_bias>linear"
    assert text(match(linear, target)) == expected
    target.args, target.kwargs = (target.args[0],), {"bias": target.args[2], "weight": target.args[1]}
    assert text(match(linear, target)) == expected
    assert text(match(op(aten.linear.default)(x, w, b), target)) == expected


def test_a_residual_chain_is_claimed_from_its_end():
    graph = graph_of(lambda m, i: m.other((lambda a: F.relu(m.conv(a) + a))(F.relu(m.conv(i) + i))), IMAGE)
    whole = relu(add([conv, y])) | add([conv, y]) | conv
    assert [m.split(":")[0] for m in found(whole, graph)] == ["conv2d_2", "conv2d_1 add_1 relu_1", "conv2d add relu"]


def test_the_other_operand_is_tried_when_the_first_is_taken():
    graph = graph_of(lambda m, i: m.conv(i) + m.other(i), IMAGE)
    assert [m.split(":")[0] for m in found(add([conv, y]) | conv, graph)] == ["conv2d add", "conv2d_1"]
    assert [text(m).split(":")[0] for m in solutions(add([conv, y]), node(graph, "add"))] == [
        "conv2d add",
        "conv2d_1 add",
    ]


def test_in_place_ops_whose_write_is_seen_elsewhere_do_not_match():
    graph = graph_of(lambda m, i: (lambda c: (c.view(-1), c.relu_()))(m.conv(i)), IMAGE)
    assert found(relu(x), graph) == []
    assert "also seen through 'view'" in str(explain(relu(x), node(graph, "relu_")))
    graph = graph_of(lambda m, i: m.conv(i).view(1, -1).relu_(), IMAGE)
    assert found(relu(x), graph) == ["relu_: x=view>relu_"]
    graph = graph_of(lambda m, i: i.add_(1.0).relu_(), IMAGE)
    assert "also seen through 'i'" in str(explain(add(x), node(graph, "add_")))


def test_a_buffer_that_is_written_is_not_constant():
    def step(m, i):
        m.table.add_(1.0)
        return F.linear(i, m.table)

    graph = graph_of(step, ROW)
    assert "not constant" in str(explain(linear, node(graph, "linear")))


def test_when_is_a_condition_on_the_node():
    grouped = op(aten.conv2d.default, when=lambda n: n.args[-1] == 3 or "it is not grouped")(x)
    assert found(grouped, graph_of(lambda m, i: m.conv(i), IMAGE)) == []
    graph = graph_of(lambda m, i: m.conv(i), IMAGE)
    assert str(explain(grouped, node(graph, "conv2d"))) == "it is not grouped"


@pytest.mark.parametrize(
    ("function", "pattern", "root", "reason"),
    [
        (lambda m, i: F.relu(i), relu(mac), "relu", "'i' is placeholder, not conv2d or linear"),
        (
            lambda m, i: (lambda c: F.relu(c) * c)(m.conv(i)),
            relu(mac),
            "relu",
            "the output of 'conv2d' is used 2 times (relu, mul)",
        ),
        (
            lambda m, i: F.conv2d(i, i.repeat(3, 1, 1, 1)),
            conv,
            "conv2d",
            "operand 'w' of 'conv2d' is not constant: it depends on the input 'i'",
        ),
        (
            lambda m, i: F.relu(F.conv2d(i, torch.rand_like(m.conv.weight))),
            relu(conv),
            "relu",
            "operand 'w' of 'conv2d' is not constant: it depends on 'rand_like' (aten.rand_like.default)",
        ),
        (lambda m, i: i + 1, add(x, y), "add", "operand 'y' (operand 1) of 'add' is the literal 1, not a tensor"),
        (lambda m, i: i + i.relu(), add(x, x), "add", "'x' is 'i' in one place and 'relu' in another"),
        (lambda m, i: i.sigmoid(), relu(x), "sigmoid", "'sigmoid' is sigmoid, not relu"),
        (lambda m, i: m.conv(i), relu(x) | conv, "conv2d", None),
    ],
)
def test_explain(function, pattern, root, reason):
    answer = explain(pattern, node(graph_of(function, IMAGE), root))
    assert (answer is None) if reason is None else str(answer).startswith(reason)


def test_explain_reports_the_attempt_that_got_furthest():
    graph = graph_of(lambda m, i: F.relu(i + F.conv2d(i, i.repeat(3, 1, 1, 1))), IMAGE)
    answer = explain(relu(add([conv, y])) | relu(conv), node(graph, "relu"))
    assert answer.node.name == "conv2d"
    assert answer.matched == 3
    assert "not constant" in answer.reason


def test_patterns_are_values():
    assert op(aten.relu.default)(x) == op(aten.relu.default)(Arg("x"))
    assert op(aten.relu).targets >= {aten.relu.default, aten.relu_.default}
    assert aten.add_.Tensor in op(aten.add.Tensor).targets
    assert aten.add.Scalar not in op(aten.add.Tensor).targets
    assert str(clamp(add([conv, y])) | conv) == "hardtanh|relu(add([conv2d(x, w, b?), y])) | conv2d(x, w, b?)"
    assert len((relu(x) | conv | (relu(conv) | linear)).choices) == 4
    assert len({conv, op(aten.conv2d.default)(x, w, b)}) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (op, "at least one target"),
        (lambda: op("aten.relu"), "is not an op"),
        (lambda: relu(3), "an operand is an Arg"),
        (lambda: add([x, y], y), "list of operands stands alone"),
    ],
)
def test_what_is_not_a_pattern(make, message):
    with pytest.raises(AnnotationError, match=message):
        make()


def test_time_is_linear_in_the_length_of_a_chain():
    def chain(m, i):
        for _ in range(300):
            i = F.relu(i + 1.0)
        return i

    graph = graph_of(chain, ROW)
    assert len(found(relu(add(x)), graph)) == 300
    deep = graph_of(lambda m, i: F.linear(i, chain(m, m.table)), ROW)
    assert found(linear, deep) == ["linear: x=i>linear, w=relu_299>linear"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=12))
def test_matches_are_disjoint_and_closed(steps):
    """On any graph: no node is in two matches, inner nodes feed their match only, and matches find themselves again."""

    def build(m, i):
        values = [i]
        for kind, a, c in steps:
            left, right = values[a % len(values)], values[c % len(values)]
            values.append([F.relu(left), left + right, m.conv(left), left * 2][kind])
        return tuple(values[1:])

    graph = graph_of(build, IMAGE)
    whole = relu(add([conv, y])) | add([conv, y]) | relu(conv) | conv | add(x, y) | relu(x)
    matches = list(find(whole, graph))
    nodes = [n for m in matches for n in m.nodes]
    assert len(nodes) == len(set(nodes))
    for m in matches:
        assert all(set(n.users) <= set(m.nodes) for n in m.nodes[:-1])
        assert all(producer not in m.nodes for edges in m.operands.values() for producer, _ in edges)
        assert any(again.nodes == m.nodes for again in solutions(whole, m.root))
    targets = {aten.relu.default, aten.add.Tensor, aten.conv2d.default}
    assert set(nodes) == {n for n in graph.nodes if n.target in targets}


# ---------------------------------------------------------------- norms that will be folded


def with_norms(function):
    """A graph in training mode, and its norms with the op that each will be folded into."""
    model = Of(function)
    model.norm, model.bare = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1, bias=False)
    gm = torch.export.export(model.train(), (torch.randn(2, 3, 4, 4),)).module()
    norms = [n for n in gm.graph.nodes if n.target is aten.batch_norm.default]
    return gm.graph, {n: n.args[0] for n in norms if n.args[0].target is aten.conv2d.default}


@pytest.mark.parametrize(
    ("function", "pattern", "expected"),
    [
        (
            lambda m, i: F.relu(m.norm(m.conv(i))),
            relu(conv) | conv,
            ["conv2d relu: x=i>conv2d, w=conv_weight>conv2d, b=conv_bias>conv2d"],
        ),
        # an op without a bias takes the norm's shift, by whatever spelling
        (
            lambda m, i: F.relu(m.norm(m.bare(i))),
            relu(conv) | conv,
            ["conv2d relu: x=i>conv2d, w=bare_weight>conv2d, b=norm_bias>batch_norm"],
        ),
        (lambda m, i: m.norm(m.bare(i)), mac, ["conv2d: x=i>conv2d, w=bare_weight>conv2d, b=norm_bias>batch_norm"]),
        # an operand from outside is the norm itself
        (
            lambda m, i: m.norm(m.conv(i)) + i,
            add([y, x]),
            ["add: y=batch_norm>add, x=i>add"],
        ),
        # what reads the norm counts
        (
            lambda m, i: (lambda n: F.relu(n) * n)(m.norm(m.conv(i))),
            relu(conv) | conv,
            ["conv2d: x=i>conv2d, w=conv_weight>conv2d, b=conv_bias>conv2d"],
        ),
        # what is folded is not there
        (lambda m, i: m.norm(m.conv(i)), op(aten.batch_norm.default)(x), []),
        (lambda m, i: m.norm(F.relu(i)), op(aten.batch_norm.default)(x), ["batch_norm: x=relu>batch_norm"]),
    ],
)
def test_norms_that_will_be_folded_are_looked_through(function, pattern, expected):
    graph, folded = with_norms(function)
    before = str(graph)
    assert [text(m) for m in find(pattern, graph, folded=folded)] == expected
    assert str(graph) == before


def test_the_value_of_a_match_is_that_of_the_last_norm():
    graph, folded = with_norms(lambda m, i: m.norm(m.conv(F.relu(m.norm(m.conv(i))))))
    first, last = folded
    alone, pair = find(relu(conv) | conv, graph, folded=folded)
    assert (alone.root, alone.nodes, alone.folded) == (last, (folded[last],), (last,))
    assert (pair.root.name, [n.name for n in pair.nodes], pair.folded) == ("relu", ["conv2d", "relu"], (first,))
    assert match(relu(conv), pair.root) is None
    assert match(relu(conv), pair.root, folded=folded).nodes == pair.nodes


def test_mismatches_behind_a_norm_name_what_is_there():
    graph, folded = with_norms(lambda m, i: (lambda n: F.relu(n) * n)(m.norm(m.conv(i))))
    assert str(explain(relu(conv), node(graph, "relu"), folded=folded)) == (
        "the output of 'batch_norm' is used 2 times (relu, mul)"
    )
    assert str(explain(relu(linear), node(graph, "relu"), folded=folded)) == "'conv2d' is conv2d, not linear"
    assert str(explain(relu(linear), node(graph, "relu"))) == "'batch_norm' is batch_norm, not linear"
