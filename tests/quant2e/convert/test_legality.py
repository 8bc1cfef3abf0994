"""Each rule of a legal Q/DQ graph, broken once by hand."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from quant2e.convert.legality import LEGAL, check_legality, problems
from quant2e.errors import PassError
from quant2e.graph.qdq_ops import qd
from tests.quant2e.annotators import aten

Q, DQ = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default
QC, DQC = qd.quantize_per_channel.default, qd.dequantize_per_channel.default
S8 = (-128, 127, torch.int8)


class Builder:
    """A graph of one input ``x: f32[2, 3]``, node by node, with the ``val`` that each would have."""

    def __init__(self):
        self.graph, self.root = Graph(), nn.Module()
        self.x = self.graph.placeholder("x")
        self.x.meta["val"] = torch.empty(2, 3)

    def call(self, target, *args, val=None, **kwargs):
        node = self.graph.call_function(target, args, kwargs)
        if val is not None:
            node.meta["val"] = val
        return node

    def constant(self, name, value):
        self.root.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta["val"] = value
        return node

    def module(self, output):
        self.graph.output(output)
        return GraphModule(self.root, self.graph)


INT8, FLOAT = torch.empty(2, 3, dtype=torch.int8), torch.empty(2, 3)


def legal(b):
    q = b.call(Q, b.x, 0.5, 0, *S8, val=INT8)
    scale, zero = b.constant("scale", torch.ones(3)), b.constant("zero", torch.zeros(3, dtype=torch.int64))
    qc = b.call(QC, b.call(DQ, q, 0.5, 0, *S8, val=FLOAT), scale, zero, 1, *S8, val=INT8)
    both = b.call(DQ, q, 0.5, 0, *S8, out_dtype=torch.float32, val=FLOAT)
    return (b.call(DQC, qc, scale, zero, 1, *S8, val=FLOAT), both)


def observer_left(b):
    b.root.add_module("activation_post_process_0", nn.Identity())
    return b.graph.call_module("activation_post_process_0", (b.x,))


def quantized_twice(b):
    q = b.call(Q, b.x, 0.5, 0, *S8, val=INT8)
    return b.call(Q, q, 0.5, 0, *S8, val=INT8)


def dequantized_as_another_dtype(b):
    whole = b.constant("w", torch.zeros(2, 3, dtype=torch.uint8))
    return b.call(DQ, whole, 0.5, 0, *S8, val=FLOAT)


def range_too_wide(b):
    return b.call(Q, b.x, 0.5, 0, -128, 255, torch.int8, val=INT8)


def range_upside_down(b):
    return b.call(Q, b.x, 0.5, 0, 5, -5, torch.int8, val=INT8)


def undone_with_another_scale(b):
    return b.call(DQ, b.call(Q, b.x, 0.5, 0, *S8, val=INT8), 0.25, 0, *S8, val=FLOAT)


def two_consumers(b):
    dq = b.call(DQ, b.call(Q, b.x, 0.5, 0, *S8, val=INT8), 0.5, 0, *S8, val=FLOAT)
    return b.call(aten.relu.default, dq, val=FLOAT), b.call(aten.neg.default, dq, val=FLOAT)


def axis_that_does_not_exist(b):
    scale, zero = b.constant("scale", torch.ones(3)), b.constant("zero", torch.zeros(3, dtype=torch.int64))
    return b.call(QC, b.x, scale, zero, 2, *S8, val=INT8)


def too_many_scales(b):
    scale, zero = b.constant("scale", torch.ones(3)), b.constant("zero", torch.zeros(3, dtype=torch.int64))
    return b.call(QC, b.x, scale, zero, 0, *S8, val=INT8)


def groups_that_do_not_divide(b):
    scale, zero = b.constant("scale", torch.ones(2, 1)), b.constant("zero", torch.zeros(2, 1, dtype=torch.int32))
    return b.call(qd.quantize_per_channel_group.default, b.x, scale, zero, *S8, 2, val=INT8)


def too_few_group_scales(b):
    scale, zero = b.constant("scale", torch.ones(1, 1)), b.constant("zero", torch.zeros(1, 1, dtype=torch.int32))
    return b.call(qd.quantize_per_channel_group.default, b.x, scale, zero, *S8, 3, val=INT8)


def scale_of_zero(b):
    return b.call(Q, b.x, 0.0, 0, *S8, val=INT8)


def scale_of_nan(b):
    return b.call(Q, b.x, float("nan"), 0, *S8, val=INT8)


def one_scale_infinite(b):
    scale = b.constant("scale", torch.tensor([1.0, float("inf"), 1.0]))
    return b.call(QC, b.x, scale, b.constant("zero", torch.zeros(3, dtype=torch.int64)), 1, *S8, val=INT8)


BROKEN = {
    observer_left: ("no observer is left", "an observer is left in the graph"),
    quantized_twice: ("only float tensors are quantized", "a tensor of torch.int8"),
    dequantized_as_another_dtype: (
        "a dequantize reads the dtype it names",
        "dequantizes torch.int8, but 'w' is torch.uint8",
    ),
    range_too_wide: ("the integer range fits the dtype", "[-128, 255] does not fit torch.int8"),
    range_upside_down: ("the integer range fits the dtype", "[5, -5] does not fit torch.int8"),
    undone_with_another_scale: ("a dequantize undoes its quantize", "not those of its quantize"),
    two_consumers: ("one consumer per dequantize", "it has 2 consumers"),
    axis_that_does_not_exist: ("one scale per channel", "its channel axis is 2, but 'x' has 2 dimensions"),
    too_many_scales: ("one scale per channel", "3 scales for 2 channels along axis 0"),
    groups_that_do_not_divide: ("one scale per group", "groups of 2 do not divide the rows of 'x', which is [2, 3]"),
    too_few_group_scales: ("one scale per group", "1 scales for 2 groups"),
    scale_of_zero: ("scales are positive and finite", "its scale is 0.0"),
    scale_of_nan: ("scales are positive and finite", "its scale is nan"),
    one_scale_infinite: ("scales are positive and finite", "one of its scales is not a positive"),
}


def test_a_legal_graph():
    b = Builder()
    assert problems(b.module(legal(b))) == []


@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)
def test_a_broken_rule(make):
    rule, message = BROKEN[make]
    b = Builder()
    gm = b.module(make(b))
    (problem,) = problems(gm)
    assert message in problem
    assert problem.endswith(f"(rule: {rule})")
    with pytest.raises(PassError, match="the converted graph is not legal"):
        check_legality(gm)


def test_every_rule_is_broken_here():
    assert {rule for rule, _ in BROKEN.values()} == {name for name, _ in LEGAL}


def test_all_problems_are_listed():
    b = Builder()
    gm = b.module((scale_of_zero(b), range_too_wide(b), two_consumers(b)))
    assert [line.rsplit("rule: ", 1)[1] for line in problems(gm)] == [
        "scales are positive and finite)",
        "the integer range fits the dtype)",
        "one consumer per dequantize)",
    ]


def test_a_dynamic_requantization_reads_its_operand_twice():
    b = Builder()
    dq = b.call(DQ, b.call(Q, b.x, 0.5, 0, *S8, val=INT8), 0.5, 0, *S8, val=FLOAT)
    chosen = b.call(qd.choose_qparams.tensor, dq, -128, 127, 1e-6, torch.int8)
    again = b.call(qd.quantize_per_tensor.tensor, dq, chosen, chosen, *S8, val=INT8)
    assert problems(b.module(again)) == []
