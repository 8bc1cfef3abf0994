"""Which writes in place are observable, and copies of what is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quant2e.graph import mutation
from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.effects import writes
from quant2e.graph.mutation import (
    clone_together,
    observable_writes,
    observed_writes,
    own_tensors,
    own_written_tensors,
    seen_through,
    written_attributes,
    written_nodes,
)


class One(nn.Module):
    """A function of an input ``x``, a buffer ``b`` and ``u``, a view of ``b``."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("b", torch.ones(4))
        self.register_buffer("u", self.b.view(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def then(*values) -> Tensor:
    """The last of several values, in their order."""
    return values[-1]


# what is written → for each write: by what other name it is seen, and whether it is seen at all
WRITES = {
    "the graph's own": (lambda _, x: (x * 2).relu_(), [(None, False)]),
    "read before": (lambda _, x: (lambda y: y.sin() * y.relu_())(x * 2), [(None, False)]),
    "through a view, and only so": (lambda _, x: (x * 2).view(2, 2).relu_(), [(None, False)]),
    "twice in a row": (lambda _, x: (x * 2).relu_().add_(1), [(None, False), (None, False)]),
    "read through a view of before": (
        lambda _, x: (lambda y: (lambda v: then(y.relu_(), v + 1))(y.view(2, 2)))(x * 2),
        [("view", True)],
    ),
    "what it is a view of is read": (
        lambda _, x: (lambda y: then(y.view(2, 2).relu_(), y + 1))(x * 2),
        [("mul", True)],
    ),
    "a part of what is read": (lambda _, x: (lambda y: then(y[1:].relu_(), y + 1))(x * 2), [("mul", True)]),
    "beside another view": (
        lambda _, x: (lambda y: (lambda a, b: then(a.relu_(), b + 1))(y[:2], y[2:]))(x * 2),
        [("slice_2", True)],
    ),
    "an input": (lambda _, x: x.relu_() + 1, [("x", True)]),
    "an input, through a write": (lambda _, x: x.relu_().add_(1), [("x", True), ("x", True)]),
    "a buffer": (lambda m, x: m.b.add_(x), [("b", True)]),
    "a buffer, through views": (lambda m, x: then(m.b.view(2, 2)[0].add_(1), x), [("b", True)]),
    "statistics": (
        lambda m, x: torch.batch_norm(x.repeat(2, 1), None, None, m.b, m.b, True, 0.1, 1e-5, False),
        [(None, True)],
    ),
    "metadata": (lambda _, x: x * torch.tensor([1.0]), []),
    "nothing": (lambda m, x: x + m.b, []),
}


@pytest.mark.parametrize(("body", "expected"), WRITES.values(), ids=WRITES)
def test_who_sees_a_write(body, expected):
    graph = capture(One(body), torch.ones(4)).graph
    writers = [node for node in graph.nodes if writes(node)]
    names = [seen_through(node) for node in writers]
    assert [(n and n.name, bool(observed_writes(w))) for n, w in zip(names, writers, strict=True)] == expected
    found = observable_writes(graph)
    assert {write.writer for write in found.values()} <= set(writers)
    assert bool(found) is any(seen for _, seen in expected)


def test_who_must_see_a_write():
    graph = capture(One(lambda _, x: (lambda y: then(y.sin(), y[1:].relu_(), y + 1))(x * 2)), torch.ones(4)).graph
    found = {node.name: write for node, write in observable_writes(graph).items()}
    assert {name: sorted(n.name for n in write.consumers) for name, write in found.items()} == {
        "mul": ["add", "slice_1"],
        "slice_1": ["relu_"],
    }
    assert {write.writer.name for write in found.values()} == {"relu_"}


def test_what_is_written_has_many_names():
    gm = capture(One(lambda m, x: then(m.u[0].add_(1), m.b + x)), torch.ones(4))
    assert {node.name for node in written_nodes(gm.graph)} == {"u", "b", "select", "add_"}
    assert list(written_attributes(gm)) == ["b", "u"]


@pytest.mark.parametrize("own", [own_written_tensors, own_tensors])
def test_a_copy_sees_what_it_writes_under_another_name(own):
    gm = capture(One(lambda m, x: then(m.u[0].add_(1), m.b + x)), torch.zeros(4))
    copy = copy_graph(gm)
    own(copy)
    assert [copy(torch.zeros(4)).tolist() for _ in range(2)] == [[2.0, 2.0, 1.0, 1.0], [3.0, 3.0, 1.0, 1.0]]
    assert torch.equal(gm.b, torch.ones(4))


def test_copies_share_memory_as_the_tensors_do():
    whole = torch.arange(6.0)
    tensors = [
        whole,
        whole[2:4],
        whole.view(2, 3).t(),
        torch.ones(2, 2).t(),
        torch.empty(0),
        nn.Parameter(torch.ones(2)),
    ]
    copies = [clone_together(tensors)[id(t)] for t in tensors]
    assert [(c.shape, c.stride(), c.storage_offset(), c.tolist()) for c in copies] == [
        (t.shape, t.stride(), t.storage_offset(), t.tolist()) for t in tensors
    ]
    together = clone_together(tensors)
    together[id(whole)].zero_()
    assert together[id(tensors[1])].tolist() == [0, 0]
    assert whole.tolist() == [0, 1, 2, 3, 4, 5]
    assert not any(c.requires_grad for c in together.values())


def test_long_chains_of_writes_are_looked_at_once(monkeypatch):
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.neg.default, (graph.placeholder("x"),))
    for _ in range(3000):
        node = graph.call_function(torch.ops.aten.add_.Tensor, (node, 1))
    graph.output(node)
    looks = []
    monkeypatch.setattr(
        mutation, "_look", lambda node, known, look=mutation._look: looks.append(node) or look(node, known)
    )
    assert observable_writes(graph) == {}
    assert len(looks) == 3000
