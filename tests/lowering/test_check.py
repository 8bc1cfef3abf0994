"""What a wrong program is blamed on, and what two right programs may choose differently."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from lowering import verify
from lowering.check import checked
from lowering.choices import choices_in, compare_as_chosen
from lowering.first_difference import first_difference, up_to, way_out
from quant2e.errors import LoweringError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import copy_graph
from tests.lowering.graphs import Cnn, Weight, on_grid

F = torch.nn.functional
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def mistaken(target, change):
    """A lowering that gets every call of ``target`` wrong."""

    def lower(graph):
        program = copy_graph(graph)
        for node in list(program.graph.nodes):
            if node.target is target:
                change(program.graph, node)
        program.recompile()
        return program

    return lower


def halves(graph, node):
    with graph.inserting_after(node):
        half = graph.call_function(torch.ops.aten.mul.Tensor, (node, 0.5))
    node.replace_all_uses_with(half, delete_user_cb=lambda user: user is not half)


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.last = (Weight(torch.randn(8, 8) * 0.3) for _ in range(3))

    def forward(self, x):
        x = on_grid(x, (0.05, 0))
        y = on_grid(F.linear(x, self.left()), (0.05, 0))
        z = on_grid(torch.tanh(F.linear(x, self.right())), (0.01, 0))
        return on_grid(F.linear(y + z, self.last()), (0.05, 0)).softmax(-1)


def capture(module, *args):
    return quant2e.capture(module.eval(), args)


@pytest.mark.parametrize(
    ("module", "x", "target", "named"),
    [
        (Cnn(), IMAGE, torch.ops.aten.conv2d.default, "conv2d"),
        (Cnn(), IMAGE, torch.ops.aten.relu.default, "conv2d"),
        (Cnn(), IMAGE, torch.ops.aten.mean.dim, "mean"),
        (Cnn(), IMAGE, torch.ops.aten.linear.default, "linear"),
        (TwoBranches(), torch.randn(4, 8), torch.ops.aten.linear.default, "linear"),
        (TwoBranches(), torch.randn(4, 8), torch.ops.aten.tanh.default, "linear_1"),
        (TwoBranches(), torch.randn(4, 8), torch.ops.aten.add.Tensor, "add"),
        (TwoBranches(), torch.randn(4, 8), torch.ops.aten.softmax.int, "softmax"),
    ],
)
def test_the_op_that_is_wrong_is_named(module, x, target, named):
    graph, lower = capture(module, x), mistaken(target, halves)
    lowerings = []

    def counted(part):
        lowerings.append(part)
        return lower(part)

    found = first_difference(graph, [Call((x,), {})], counted)
    assert found.op.name == named
    assert not found.found.passed
    assert len(lowerings) <= 5


def test_the_error_says_where_and_what_to_do():
    graph, lower = capture(Cnn(), IMAGE), mistaken(torch.ops.aten.mean.dim, halves)
    message = (
        r"the program does not compute what its Q/DQ graph says: FAILED: .*they part at 'mean' \(aten.mean.dim\).*"
        r"up to 'relu_2' it agrees. Leave it in float, by quantizer.set_node\('mean', None\)"
    )
    with pytest.raises(LoweringError, match=message) as error:
        checked("the program", lower(graph), graph, [Call((IMAGE,), {})], lower, graph=graph, otherwise="Stop.")
    assert "verify=False" not in str(error.value)


def test_the_way_out_of_a_float_op_is_the_target_s():
    x = torch.randn(4, 8)
    graph, lower = capture(TwoBranches(), x), mistaken(torch.ops.aten.softmax.int, halves)
    with pytest.raises(LoweringError, match=r"they part at 'softmax'.* Take another road$"):
        checked("it", lower(graph), graph, [Call((x,), {})], lower, graph=graph, otherwise="Take another road")
    assert way_out(next(n for n in graph.graph.nodes if n.name == "softmax")) is None


def test_a_difference_that_no_part_shows_is_said_to_be_one():
    graph = capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4))

    def lower(part):
        return part

    with pytest.raises(LoweringError, match="no part of the graph up to one of its ops shows the difference. Rest."):
        checked(
            "it", lambda x: -graph(x), graph, [Call((torch.randn(2, 4),), {})], lower, graph=graph, otherwise="Rest."
        )


def test_a_part_returns_what_the_rest_reads_on_its_grid():
    graph = capture(Cnn(), IMAGE)
    node = next(n for n in graph.graph.nodes if n.name == "conv2d_1")
    part, values = up_to(graph, node)
    with torch.no_grad():
        found = part(IMAGE)
    assert len(found) == len(values) == 2  # the branch, and what the residual adds to it
    assert all(value.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default for value in values[:1])
    assert {str(n.target) for n in part.graph.nodes}.isdisjoint({"aten.linear.default", "aten.mean.dim"})


# ------------------------------------------------------------------------------------------------------------ choices


class Detector(nn.Module):
    """Scores of few different values, so that many tie, and the boxes of the best."""

    def __init__(self, k=5):
        super().__init__()
        self.k = k

    def forward(self, scores, boxes):
        best = on_grid(scores, (0.25, 0)).topk(self.k)
        return best.values, boxes[best.indices]


def last_first(graph, node):
    """Ties of a topk the other way round: the last of equal values comes first."""
    x, k = node.args[0], node.args[1]
    aten = torch.ops.aten
    with graph.inserting_before(node):
        back = graph.call_function(aten.flip.default, (x, [-1]))
        order = graph.call_function(aten.sort.stable, (back,), {"stable": True, "dim": -1, "descending": True})
        parts = [graph.call_function(__import__("operator").getitem, (order, place)) for place in range(2)]
        parts = [graph.call_function(aten.slice.Tensor, (part, -1, 0, k)) for part in parts]
        size = graph.call_function(aten.sym_size.int, (x, -1))
        last = graph.call_function(__import__("operator").sub, (size, 1))
        parts[1] = graph.call_function(aten.rsub.Scalar, (parts[1], last))
    for user in list(node.users):
        user.replace_all_uses_with(parts[user.args[1]])


SCORES = torch.rand(20, generator=torch.Generator().manual_seed(3))
BOXES = torch.randn(20, 4, generator=torch.Generator().manual_seed(4)) * 100
CALL = Call((SCORES, BOXES), {})


def test_ties_may_be_chosen_from_otherwise():
    graph = capture(Detector(), SCORES, BOXES)
    lower = mistaken(torch.ops.aten.topk.default, last_first)
    program = lower(graph)
    assert not torch.equal(program(*CALL.args)[1], graph(*CALL.args)[1])
    assert not verify(program, graph, [CALL.args]).passed
    found = compare_as_chosen(program, graph, graph, [CALL], lower)
    assert found.passed
    assert found.choices == ("topk",)
    assert "given what topk chose among values as good" in str(found)


def worst_first(graph, node):
    node.args = (*node.args[:2], -1, False)


def test_a_wrong_choice_is_no_tie():
    graph = capture(Detector(), SCORES, BOXES)
    lower = mistaken(torch.ops.aten.topk.default, worst_first)
    assert not compare_as_chosen(lower(graph), graph, graph, [CALL], lower).passed
    with pytest.raises(LoweringError, match="they part at 'topk'"):
        checked("it", lower(graph), graph, [CALL], lower, graph=graph, otherwise="")


def twice_the_best(graph, node):
    """Right values, and the place of the first for all of them."""
    (places,) = (user for user in node.users if user.args[1] == 1)
    with graph.inserting_after(places):
        first = graph.call_function(torch.ops.aten.slice.Tensor, (places, -1, 0, 1))
    with graph.inserting_after(first):
        same = graph.call_function(torch.ops.aten.expand.default, (first, [5]))
    places.replace_all_uses_with(same, delete_user_cb=lambda user: user is not first)


def test_a_place_may_be_taken_once():
    scores = torch.ones(20)
    graph = capture(Detector(), scores, BOXES)
    lower = mistaken(torch.ops.aten.topk.default, twice_the_best)
    assert not compare_as_chosen(lower(graph), graph, graph, [Call((scores, BOXES), {})], lower).passed


def test_what_is_computed_from_a_choice_is_compared_given_it():
    graph = capture(Detector(), SCORES, BOXES)

    def lower(part):
        program = mistaken(torch.ops.aten.topk.default, last_first)(part)
        return mistaken(torch.ops.aten.index.Tensor, halves)(program)

    with pytest.raises(LoweringError, match="they part at 'index'"):
        checked("it", lower(graph), graph, [CALL], lower, graph=graph, otherwise="")


class Decides(nn.Module):
    def forward(self, x):
        x = on_grid(x, (0.1, 0))
        return x.argmax(-1), x.max(-1).indices, x > 0.55, x.sort(-1).indices


def test_a_step_may_decide():
    x = torch.arange(9) * 0.1
    graph = capture(Decides(), x)
    found = choices_in(graph)
    assert [node.name for node in found] == ["argmax", "getitem_1", "gt", "getitem_3"]
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default

    def add(part):
        program = mistaken(dequantize, lambda g, n: None)(part)
        program.register_buffer("more", torch.arange(9).remainder(2).mul(0.1))
        for node in [n for n in program.graph.nodes if n.target is dequantize]:
            with program.graph.inserting_after(node):
                read = program.graph.get_attr("more")
            with program.graph.inserting_after(read):
                more = program.graph.call_function(torch.ops.aten.add.Tensor, (node, read))
            node.replace_all_uses_with(more, delete_user_cb=lambda user, more=more: user is not more)
        program.recompile()
        return program

    program = add(graph)
    assert not torch.equal(program(x)[2], graph(x)[2])
    found = compare_as_chosen(program, graph, graph, [Call((x,), {})], add)
    assert found.passed
    assert set(found.choices) == {"argmax", "max_1", "gt"}
