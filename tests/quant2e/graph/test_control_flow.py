"""Control flow: its form in Python computes what the op does, and constants go into bodies and out again."""

import pytest
import torch
from torch import nn

import quant2e
from quant2e.graph.constants import Constants
from quant2e.graph.control_flow import (
    GraphInterpreter,
    bodies,
    cond,
    control_flow,
    graphs_of,
    hand_constants,
    has_bodies,
    hold_constants,
    map_impl,
    operands_of_bodies,
    run_in_python,
    scan,
    while_loop,
)
from quant2e.graph.effects import writes
from quant2e.graph.printer import graph_text
from tests.control_flow_models import SHAPES, Branches, Mapped, Nested, Recurrent, captured, data

KINDS = list(SHAPES)


def flows(gm):
    return [node for node in gm.graph.nodes if control_flow(node) is not None]


def double(x, y):
    return (x * 2 + y, x - y)


X, Y, ZERO, OPS = torch.randn(3, 4), torch.randn(4), torch.tensor(0), torch.ops.higher_order
CALLS = {
    "taken": (cond, OPS.cond, (torch.tensor(True), double, lambda x, y: (x, y + x), (X, Y))),
    "not taken": (cond, OPS.cond, (torch.tensor(False), double, lambda x, y: (y + x, x), (X, Y))),
    "loop": (while_loop, OPS.while_loop, (lambda i, x, y: i < 3, lambda i, x, y: (i + 1, x + y), (ZERO, X), (Y,))),
    "no step": (while_loop, OPS.while_loop, (lambda i, x: i < 0, lambda i, x: (i, x), (ZERO, X), ())),
    "scan": (scan, OPS.scan, (lambda c, x, y: (c + x, c * y), [Y], [X], (Y + 1,))),
    "map": (map_impl, OPS.map_impl, (double, [X], (Y,))),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_python_computes_what_the_op_does(name):
    in_python, op, arguments = CALLS[name]
    made, wanted = list(in_python(*arguments)), list(op(*arguments))
    assert [type(a) for a in made] == [type(b) for b in wanted]
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True) if isinstance(a, torch.Tensor))
    assert name != "no step" or made[1] is not X  # a tensor of its own


@pytest.mark.parametrize("kind", KINDS)
def test_constants_go_in_and_out_again(kind):
    gm, (x,) = captured(kind), data(kind, 1)[0]
    wanted, parameters = gm(x), dict(gm.named_parameters())
    constants = frozenset(Constants(gm.graph))
    for node in flows(gm):
        given = operands_of_bodies(node)
        moved = hold_constants(gm, node, constants)
        assert moved == sum(operand in constants and operand.op == "get_attr" for operand in given) > 0
        held = {id(p) for body in bodies(node).values() for p in body.parameters()}
        assert held <= {id(p) for p in parameters.values()}
        run_in_python(node, wanted=True)
    gm.recompile()
    assert has_bodies(flows(gm)[0])
    result = gm(x)
    assert torch.allclose(result, wanted, atol=1e-6)  # with gradients, torch scans otherwise
    result.sum().backward()  # through Python, not through a traced backward
    assert any(p.grad is not None for p in parameters.values())
    for node in flows(gm):
        hand_constants(gm, node)
        run_in_python(node, wanted=False)
        assert not any(list(body.parameters()) + list(body.buffers()) for body in bodies(node).values())
    gm.graph.lint()
    gm.recompile()
    assert torch.allclose(gm(x), wanted, atol=1e-6)
    assert not gm(x).requires_grad or kind is Branches  # whose first layer lies outside


def test_bodies_that_write_to_their_slices_do_so_in_python_too():
    """torch 2.14 hands over which operands those are; the form in Python writes to them itself."""
    written = X.clone()
    (made,) = map_impl(lambda x: (x.add_(1) * 2,), [written], (), mutated_arg_indices="0")
    assert torch.equal(written, X + 1)
    assert torch.equal(made, (X + 1) * 2)
    written = X.clone()
    scan(lambda c, x: (c + x.add_(1), x.clone()), [X[0]], [written], (), mutated_arg_indices="1")
    assert torch.equal(written, X + 1)


def test_equal_constants_of_two_branches_are_one_tensor():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x @ self.w, lambda x: x - self.w.sum(), (x,))

    gm = quant2e.capture(Both(), (torch.randn(2, 8),))
    (node,) = flows(gm)
    hold_constants(gm, node, frozenset(Constants(gm.graph)))
    assert hand_constants(gm, node) == 1


def test_graphs_of_a_program():
    paths = [path for path, _ in graphs_of(captured(Nested))]
    step = "while_loop_body_graph_0"
    assert paths == ["", "while_loop_cond_graph_0", step, f"{step}.true_graph_0", f"{step}.false_graph_0"]


def test_only_what_a_body_writes_counts_as_written():
    gm = captured(Nested)  # its relu_ is in place, on a tensor of its own
    assert [writes(node) for node in flows(gm)] == [[]]
    (node,) = flows(captured(Branches))
    body = next(iter(bodies(node).values()))
    placeholder = next(each for each in body.graph.nodes if each.op == "placeholder")
    with body.graph.inserting_after(placeholder):
        view = body.graph.call_function(torch.ops.aten.view.default, (placeholder, [-1]))
    with body.graph.inserting_after(view):
        body.graph.call_function(torch.ops.aten.zero_.default, (view,))
    assert writes(node) == operands_of_bodies(node)[:1]


@pytest.mark.parametrize("kind", [Recurrent, Mapped, Nested])
def test_interpreter_runs_bodies_node_by_node(kind):
    seen = []

    class Watching(GraphInterpreter):
        def inside(self, path, body):
            seen.append(path)
            return Watching(body)

    gm, (x,) = captured(kind), data(kind, 1)[0]
    for node in flows(gm):
        run_in_python(node, wanted=True)
    with torch.no_grad():
        assert torch.equal(Watching(gm).run(x), gm(x))
    assert set(seen) >= set(bodies(flows(gm)[0]))


def test_graph_text_names_the_op_in_both_forms():
    gm = captured(Branches)
    text = graph_text(gm)
    run_in_python(flows(gm)[0], wanted=True)
    assert graph_text(gm) == text
