"""Programs of graphs that write to their buffers: what they begin with, what calls leave, and whose it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quant2e
from lowering import package_inductor, to_executorch, to_inductor, to_onnx, verify
from lowering.state import Apart, from_start, own_graph, state_of
from quant2e.errors import LoweringError
from tests.lowering.graphs import Weight, on_grid

F = torch.nn.functional
GRID = (0.05, 3)


class Stateful(nn.Module):
    """A quantized linear, and a buffer or two."""

    def __init__(self, **buffers):
        super().__init__()
        torch.manual_seed(0)
        self.weight = Weight(torch.randn(8, 8) * 0.3)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def product(self, x):
        return on_grid(F.linear(on_grid(x, GRID), self.weight()), GRID)


class Counter(Stateful):
    def __init__(self):
        super().__init__(calls=torch.tensor(3), weight_of_calls=torch.tensor(0.5))

    def forward(self, x):
        self.calls.add_(2)
        self.weight_of_calls.add_(1.0)
        return self.product(x) * self.weight_of_calls + self.calls


class RingBuffer(Stateful):
    def __init__(self):
        super().__init__(ring=torch.randn(4, 8))

    def forward(self, x):
        self.ring.copy_(torch.cat([self.ring[1:], self.product(x)]))
        return self.ring.sum(0, keepdim=True)


class Cache(Stateful):
    """Keys of one head; holds six positions."""

    def __init__(self):
        super().__init__(keys=torch.randn(6, 8), position=torch.tensor([1]))

    def forward(self, x):
        self.keys.index_copy_(0, self.position, self.product(x))
        self.position.add_(1)
        return torch.softmax(x @ self.keys.T, -1) @ self.keys


class RunningMean(Stateful):
    """What a batch norm does that goes on learning."""

    def __init__(self):
        super().__init__(mean=torch.randn(8), var=torch.rand(8) + 1)

    def forward(self, x):
        y = self.product(x) + x
        self.mean.mul_(0.9).add_(0.1 * y.mean(0))
        self.var.mul_(0.9).add_(0.1 * y.square().mean(0))
        return (y - self.mean) * torch.rsqrt(self.var + 1e-5)


MODELS = [Counter, RingBuffer, Cache, RunningMean]
X = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))

TARGETS = [
    pytest.param(lambda graph, path: to_executorch(graph, (X,)), id="to_executorch"),
    pytest.param(lambda graph, path: to_inductor(graph, (X,)), id="to_inductor", marks=pytest.mark.inductor),
    pytest.param(
        lambda graph, path: package_inductor(graph, (X,), path=path / "program.pt2"),
        id="package_inductor",
        marks=[pytest.mark.inductor, pytest.mark.slow],
    ),
]


def called_once(module):
    """A captured graph whose buffers are no longer what they were at capture."""
    graph = quant2e.capture(module.eval(), (X,))
    with torch.no_grad():
        graph(X)
    return graph


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("lower", TARGETS)
def test_a_program_has_the_state_of_its_graph_for_itself(model, lower, tmp_path):
    pytest.importorskip("executorch")
    graph = called_once(model())
    tensors = {name: value.clone() for name, value in graph.state_dict().items()}
    program = lower(graph, tmp_path)

    assert program.verification.passed
    assert program.verification.batches >= 3  # what a call leaves behind shows in the next
    assert sorted(program.initial_state) == sorted(state_of(graph))
    assert all(torch.equal(value, tensors[name]) for name, value in graph.state_dict().items())

    with torch.no_grad():
        own = copy.deepcopy(graph)
        expected = [own(X) for _ in range(3)]
        assert not torch.allclose(expected[0], expected[1])
        for wanted in expected:
            torch.testing.assert_close(program(X), wanted, rtol=1e-4, atol=1e-4)
        assert verify(program, graph, [(X,)]).passed  # from the start, wherever the program is
        torch.testing.assert_close(program(X), own(X), rtol=1e-4, atol=1e-4)
        program.reset()
        torch.testing.assert_close(program(X), expected[0], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, tensors[name]) for name, value in graph.state_dict().items())


@pytest.mark.parametrize("model", MODELS)
def test_an_onnx_file_keeps_no_state(model, tmp_path):
    pytest.importorskip("onnxruntime")
    graph = called_once(model())
    before = state_of(graph)
    with pytest.raises(LoweringError, match="keeps nothing from one call to the next.*let the model take its state"):
        to_onnx(graph, (X,), path=tmp_path / "model.onnx", verify=False)
    assert all(torch.equal(value, before[name]) for name, value in state_of(graph).items())
    assert list(tmp_path.iterdir()) == []


def test_a_file_saved_after_a_lowering_has_the_original_values(tmp_path):
    pytest.importorskip("executorch")
    graph = quant2e.capture(Counter().eval(), (X,))
    to_executorch(graph, (X,))
    quant2e.save(graph, tmp_path / "model.pt2", example_inputs=(X,))
    assert quant2e.load(tmp_path / "model.pt2").module.calls == 3


def test_a_program_file_holds_what_the_buffers_held():
    pytest.importorskip("executorch")
    from lowering.executorch.runtime import load_method, load_program

    program = to_executorch(quant2e.capture(Counter().eval(), (X,)), (X,))
    (found,) = load_method(load_program(program.buffer), "forward").execute([X])
    torch.testing.assert_close(found, program(X))


def test_methods_of_a_program_have_states_of_their_own():
    pytest.importorskip("executorch")
    one, two = quant2e.capture(Counter().eval(), (X,)), quant2e.capture(RingBuffer().eval(), (X,))
    program = to_executorch({"one": one, "two": two}, {"one": (X,), "two": (X,)})
    assert sorted(program.initial_state) == ["one.calls", "one.weight_of_calls", "two.ring"]
    first = program.methods["two"](X)
    program.methods["one"](X)
    assert not torch.equal(program.methods["two"](X), first)
    program.reset()
    assert torch.equal(program.methods["two"](X), first)


def test_verification_of_a_module_leaves_its_buffers_alone():
    module = Counter()
    assert verify(copy.deepcopy(module), module, [(X,), (X,)]).passed
    assert module.calls == 3
    assert not verify(lambda x: module.product(x) * 1.5 + 5, module, [(X,)]).passed  # right in the first call only


def test_what_a_graph_writes_is_kept_apart():
    graph = quant2e.capture(RingBuffer().eval(), (X,))
    own = own_graph(graph)
    assert own.ring.data_ptr() != graph.ring.data_ptr()
    assert own.weight.stored.data_ptr() == graph.weight.stored.data_ptr()
    assert own_graph(graph, {"ring": torch.ones(4, 8)}).ring.sum() == 32
    still = quant2e.capture(nn.Linear(8, 8).eval(), (X,))
    assert own_graph(still) is still
    assert Apart(graph).stateful
    assert not Apart(still).stateful
    with from_start(still):
        pass


def test_a_full_cache_ends_the_comparison():
    class Full(Cache):
        def __init__(self):
            super().__init__()
            self.position.fill_(4)

    graph = quant2e.capture(Full().eval(), (X,))
    assert verify(copy.deepcopy(graph), graph, [(X,)]).batches == 2
