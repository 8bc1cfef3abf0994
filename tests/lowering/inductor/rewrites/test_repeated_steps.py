"""Repeated steps are cut out as one graph with the same results, and what does not repeat stays as it is."""

import pytest
import torch
from torch import nn

from lowering import to_inductor
from lowering.inductor.pipeline import Rewritten
from lowering.inductor.rewrites.graph import private_copy
from lowering.inductor.rewrites.repeated_steps import LEAST, RepeatedSteps
from quant2e import capture as captured
from quant2e import convert_pt2e, prepare_pt2e
from quant2e.graph.qdq_ops import qd
from quant2e.passes import run
from quantizers import X86InductorQuantizer

pytestmark = pytest.mark.filterwarnings("ignore:.*_flat_weights:UserWarning")

aten = torch.ops.aten


def rand(*sizes):
    return torch.randn(sizes)


def quantized(model, *inputs, recipe="w8a8-dynamic", **keywords):
    graph = captured(model.eval(), inputs, **keywords)
    return convert_pt2e(prepare_pt2e(graph, X86InductorQuantizer().set_global(recipe)))


def cut(graph):
    """The private copy of a graph, without its repeated steps, and what was cut out."""
    gm, steps = private_copy(graph), RepeatedSteps()
    run(gm, (steps,))
    return gm, steps.made


def calls(gm):
    return sum("compiled_step" in str(node.target) for node in gm.graph.nodes)


LAYERS = {
    "lstm": (nn.LSTM(5, 4), 1, LEAST + 1),
    "lstm, projected": (nn.LSTM(5, 4, proj_size=3), 1, LEAST + 2),
    "gru, two layers": (nn.GRU(5, 4, 2), 2, LEAST + 1),
    "rnn, both directions": (nn.RNN(5, 4, bidirectional=True), 2, LEAST + 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_steps_of_a_layer_are_one_graph(name):
    layer, kinds, whole = LAYERS[name]
    x = rand(LEAST + 3, 2, 5)
    graph = quantized(layer, x)
    gm, steps = cut(graph)
    torch.testing.assert_close(list(gm(x)), [*torch.utils._pytree.tree_leaves(graph(x))], rtol=0, atol=0)
    assert len(steps) == kinds
    # Before the first product and behind the last one a step is not whole, and there is none with a state of zeros.
    assert calls(gm) == kinds * whole
    for step in steps:
        inside = [node.target for node in step.body.graph.nodes]
        assert inside.count(aten.linear.default) == inside.count(qd.dequantize_per_channel.default) >= 1
        assert [len(names) for names in step.names] == [len(step.names[0])] * len(step.names)


def test_weights_alone():
    x = rand(LEAST + 3, 2, 5)
    graph = quantized(nn.GRU(5, 4), x, recipe="w8")
    gm, steps = cut(graph)
    assert (len(steps), calls(gm)) == (1, LEAST + 1)
    assert torch.equal(gm(x)[0], graph(x)[0])


class Siblings(nn.Module):
    """One linear on many inputs, none of which follows from another."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.stack([self.linear(part).tanh() for part in x.unbind(0)])


class Uneven(nn.Module):
    """A recurrence that does something else at every other step."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        h = x[0]
        for step in range(12):
            h = self.linear(h)
            h = h.tanh() if step % 2 else h.sigmoid()
        return h


@pytest.mark.parametrize(
    ("model", "x"), [(Siblings(), rand(12, 2, 4)), (Uneven(), rand(1, 2, 4)), (nn.GRU(5, 4), rand(LEAST, 2, 5))]
)
def test_what_does_not_repeat_stays(model, x):
    gm, steps = cut(quantized(model, x))
    assert not steps
    assert not calls(gm)


class SharedBlock(nn.Module):
    """A block that is applied many times, with the same weights; ``counts``: how often it is called."""

    def __init__(self, counts):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)
        self.register_buffer("calls", torch.zeros(1))
        self.counts = counts

    def forward(self, x):
        for _ in range(10):
            if self.counts:
                self.calls.add_(1)
            x = self.norm(x + self.down(self.up(x).relu()) * (self.calls + 1))
        return x


def test_blocks_of_shared_weights_are_steps_too():
    x = rand(3, 4)
    graph = quantized(SharedBlock(False), x)
    gm, steps = cut(graph)
    assert (len(steps), calls(gm)) == (1, 9)
    assert torch.equal(gm(x)[0], graph(x))


def test_a_graph_that_writes_stays():
    assert not cut(quantized(SharedBlock(True), rand(3, 4)))[1]


def test_varying_sizes_stay():
    x = rand(LEAST + 3, 2, 5)
    graph = quantized(nn.GRU(5, 4), x, dynamic_shapes=({1: torch.export.Dim("batch", min=2, max=8)},))
    assert not cut(graph)[1]


def test_a_package_is_whole():
    graph = quantized(nn.GRU(5, 4), rand(LEAST + 3, 2, 5))
    assert len(Rewritten(graph, "onednn").steps) == 1
    assert not Rewritten(graph, "onednn", whole=True).steps


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize(("engine", "length"), [("onednn", 200), ("float", 20)])
def test_long_layers_are_compiled_once(engine, length):
    torch.manual_seed(0)
    x = rand(length, 2, 8)
    graph = quantized(nn.LSTM(8, 16), x)
    program = to_inductor(graph, (x,), engines=engine)
    assert program.verification.sqnr_db > 80
    assert len(program.report.ops) == length
    assert all(op.int8 == (engine == "onednn") for op in program.report.ops)
    again = rand(length, 2, 8)
    torch.testing.assert_close(program(again), graph(again), rtol=1e-3, atol=1e-3)
