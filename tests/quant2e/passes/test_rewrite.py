"""Rewrites by pattern: what is rewritten, in which order, and what is said where nothing is."""

import torch
from torch import nn

from quant2e.annotation.pattern import Arg, constant, op
from quant2e.graph.captured.capture import capture
from quant2e.graph.edit import emit
from quant2e.graph.printer import graph_text
from quant2e.passes import Promise, run
from quant2e.passes.rewrite import Rewrite, RewriteTable

aten = torch.ops.aten
X = Arg("x")
NUMBERS = Promise(result=False)


class Fn(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return self.function(self, x)


def captured(function):
    return capture(Fn(function), torch.randn(3))


square = Rewrite(
    "square",
    op(aten.square.default)(X),
    lambda _, match: emit(match.root, aten.mul.Tensor, match.edges["x"][0], match.edges["x"][0]),
)
twice = Rewrite("twice", op(aten.neg.default)(op(aten.neg.default)(X)), lambda _, match: match.edges["x"][0])


def test_what_is_built_takes_the_place_of_the_root():
    gm = captured(lambda m, x: x.square().exp())
    assert run(gm, (square,)) == {"square": 1}
    assert graph_text(gm.graph).splitlines()[-3:] == [
        "%mul_tensor: f32[3] = aten.mul.Tensor(%x, %x)",
        "%exp: f32[3] = aten.exp.default(%mul_tensor)",
        "return [%exp]",
    ]


def test_a_result_may_be_an_operand():
    gm = captured(lambda m, x: x.exp().neg().neg())
    assert run(gm, (twice,)) == {"twice": 1}
    assert [str(node) for node in gm.graph.find_nodes(op="output")[0].all_input_nodes] == ["exp"]


def test_what_is_used_elsewhere_is_not_inside():
    gm = captured(lambda m, x: (lambda y: y.neg() + y)(x.neg()))
    assert run(gm, (twice,)) == {}
    node = next(n for n in gm.graph.nodes if n.name == "neg_1")
    assert twice.explain(node) == "the output of 'neg' is used 2 times (neg_1, add)"


def test_a_requirement_says_why():
    def of_the_input(match):
        return match.edges["x"][0].op == "placeholder" or f"'{match.edges['x'][0].name}' is computed"

    only_input = Rewrite("square", square.pattern, square.build, of_the_input)
    gm = captured(lambda m, x: x.square().square())
    first, second = (n for n in gm.graph.nodes if n.target is aten.square.default)
    assert only_input.explain(first) is None
    assert only_input.explain(second) == "'square' is computed"
    assert only_input.explain(next(iter(gm.graph.nodes))) is not None
    assert run(gm, (only_input,)) == {"square": 1}


def test_a_table_takes_the_first_that_applies_at_each_node():
    scaled = Rewrite(
        "constant", op(aten.mul.Tensor)(X, constant("w")), lambda _, m: emit(m.root, aten.add.Tensor, *m.root.args)
    )
    other = Rewrite("any", op(aten.mul.Tensor)(X, Arg("y")), lambda _, m: emit(m.root, aten.sub.Tensor, *m.root.args))
    table = RewriteTable("sums", (scaled, other))
    gm = captured(lambda m, x: (x * m.w) * x)
    product = next(n for n in gm.graph.nodes if n.name == "mul_1")
    assert scaled.explain(product).startswith("operand 'w' of 'mul_1' is not constant")
    assert table.explain(product) is None
    assert run(gm, (table,), promise=NUMBERS) == {"sums": 2}
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [aten.add.Tensor, aten.sub.Tensor]
