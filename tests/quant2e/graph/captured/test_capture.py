"""Capture: the graph is the model, the model is untouched, and what cannot be captured says why."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from quant2e.errors import CaptureError, module_path, source_line
from quant2e.graph.captured.capture import as_graph_module, capture, is_captured
from quant2e.graph.captured.module import CapturedModule, copy_graph


class Nested(nn.Module):
    """Nested inputs and outputs, keyword-only tensors, integers."""

    def forward(self, batch: dict[str, Any], scale: int = 2, *, extra: list[Tensor]) -> dict[str, Any]:
        x = batch["x"] * scale + extra[0]
        return {"y": (x, batch["pair"][1]), "n": x.shape[0], "none": None}


class NoGrad(nn.Module):
    """Regions within regions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        with torch.enable_grad():
            y = y.relu()
            with torch.no_grad():
                y = self.linear(y) + 1
        with torch.autocast("cpu", enabled=False):
            return y * x


class Counter(nn.Module):
    """Mutated and non-persistent buffers, a constant that is neither, literals in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("mask", torch.ones(4), persistent=False)
        self.table = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.mask + self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])


class Tied(nn.Module):
    """One weight under two names, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.middle = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.middle(self.embedding(tokens))))


class Branch(nn.Module):
    """Control flow whose bodies hold a mode literal and a grad-mode region."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        def then(x: Tensor) -> Tensor:
            with torch.no_grad():
                return F.dropout(self.linear(x), 0.5, self.training)

        return torch.cond(x.sum() > 0, then, lambda x: x - 1, (x,))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.lstm = nn.LSTM(8, 8, 2, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.attention(x, x, x, need_weights=False)[0])[0]


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Pairs(nn.Module):
    """Named tuples, ordered dicts and variable arguments."""

    def forward(self, *pairs: Pair, **scales: dict[str, Tensor]) -> Pair:
        return Pair(sum(p.a for p in pairs) * scales["by"]["k"], pairs[0].b)


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3))


Case = tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "nested": (
        Nested,
        ({"x": torch.randn(2, 3), "pair": [torch.ones(1), torch.zeros(2)]}, 3),
        {"extra": [torch.randn(3)]},
    ),
    "keywords only": (lambda: nn.Bilinear(3, 4, 5), (), {"input1": torch.randn(2, 3), "input2": torch.randn(2, 4)}),
    "pairs": (
        Pairs,
        (Pair(torch.ones(2), torch.ones(3)), Pair(torch.ones(2), torch.zeros(3))),
        {"by": OrderedDict(k=torch.full((2,), 3.0))},
    ),
    "no grad": (NoGrad, (torch.randn(2, 4),), {}),
    "buffers": (Counter, (torch.randn(2, 4),), {}),
    "tied": (Tied, (torch.tensor([[1, 2, 3]]),), {}),
    "branch": (Branch, (torch.ones(2, 4),), {}),
    "attention": (Attention, (torch.randn(2, 3, 8),), {}),
    "conv": (conv_net, (torch.randn(2, 3, 8, 8),), {}),
}


def same(a: Any, b: Any) -> bool:
    return all(
        torch.equal(p, q) if isinstance(p, Tensor) else p == q
        for p, q in zip(tree_leaves(a), tree_leaves(b), strict=True)
    )


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    build, args, kwargs = CASES[request.param]
    return build().eval(), args, kwargs


@pytest.mark.parametrize(
    "through",
    [
        lambda gm: gm,
        copy_graph,
        as_graph_module,
        copy.deepcopy,
        lambda gm: copy.deepcopy(copy.deepcopy(gm)),
        lambda gm: pickle.loads(pickle.dumps(gm)),
    ],
    ids=["capture", "copy_graph", "as_graph_module", "deepcopy", "deepcopy twice", "pickle"],
)
def test_computes_what_the_model_computes(case, through):
    model, args, kwargs = case
    twin = copy.deepcopy(model)
    captured = through(capture(model, args, kwargs))
    assert same(captured(*args, **kwargs), twin(*args, **kwargs))
    assert same(captured(*args, **kwargs), twin(*args, **kwargs))  # buffers move on alike
    assert list(captured.state_dict()) == [n for n in model.state_dict() if n in captured.state_dict()]
    assert {n for n, _ in captured.named_buffers()} <= {n for n, _ in model.named_buffers()}


def test_shares_tensors_with_the_model(case):
    model, args, kwargs = case
    captured = capture(model, args, kwargs)
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    for gm in (captured, copy_graph(captured)):
        assert {id(t) for t in (*gm.parameters(), *gm.buffers())} <= own
    deep = copy.deepcopy(captured)
    assert not {id(t) for t in (*deep.parameters(), *deep.buffers())} & own
    assert len(list(deep.parameters())) == len(list(captured.parameters()))  # what was tied still is


def test_a_copy_is_the_same_graph_with_its_own_nodes(case):
    model, args, kwargs = case
    captured = capture(model, args, kwargs)
    copied = copy_graph(captured)
    assert str(copied.graph) == str(captured.graph)
    assert copied.code == captured.code
    for ours, theirs in zip(copied.graph.nodes, captured.graph.nodes, strict=True):
        assert ours is not theirs
        assert (ours.name, ours.meta) == (theirs.name, theirs.meta)
        assert ours.meta is not theirs.meta
    copied.graph.eliminate_dead_code()
    copied.meta["mine"] = 1
    assert "mine" not in captured.meta


def test_the_model_is_untouched(case):
    model, args, kwargs = case
    model.train()
    before = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    state = torch.get_rng_state()
    capture(model, args, kwargs)
    with pytest.raises(CaptureError):
        capture(model, (*args, 1, 2, 3), kwargs)
    assert all(torch.equal(before[n], t) for n, t in (*model.named_parameters(), *model.named_buffers()))
    assert identities == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert attributes == {n: set(vars(m)) for n, m in model.named_modules()}
    assert all(m.training for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_a_failure_half_way_leaves_no_trace():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(1)
            self.cache = self.norm(x) + torch.rand(4)
            return x if self.cache.sum() > 0 else -x

    model, x = Fails(), torch.randn(2, 4)
    state = torch.get_rng_state()
    with pytest.raises(CaptureError, match=r"test_capture.py:\d+ `return x if self.cache.sum\(\) > 0 else -x`"):
        capture(model, x)
    assert model.seen == []
    assert not hasattr(model, "cache")
    assert torch.equal(model.norm.running_mean, torch.zeros(4))
    assert torch.equal(state, torch.get_rng_state())


def test_grad_mode_regions_are_inlined_and_know_where_they_come_from(golden):
    captured = capture(NoGrad(), torch.randn(2, 4))
    golden("capture/no_grad", captured.code)
    linears = [n for n in captured.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [module_path(n) for n in linears] == ["linear", "linear"]
    for node in captured.graph.nodes:
        if node.op == "call_function":
            assert "test_capture.py" in source_line(node) or "torch/nn" in source_line(node)
            assert isinstance(node.meta["val"], Tensor)


def test_regions_inside_control_flow_are_inlined():
    captured = capture(Branch().eval(), torch.ones(2, 4))
    assert "set_grad" not in "".join(m.code for m in captured.modules() if isinstance(m, torch.fx.GraphModule))
    assert torch.equal(captured(-torch.ones(2, 4)), -torch.ones(2, 4) - 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_grad_mode_of_the_caller_does_not_matter(mode):
    x, model = torch.randn(2, 4), NoGrad()
    with mode():
        captured = capture(model, x)
    assert captured.code == capture(model, x).code
    assert all(not p.is_inference() for p in captured.parameters())
    trained = capture(conv_net(), torch.randn(2, 3, 8, 8))
    trained(torch.randn(2, 3, 8, 8)).sum().backward()
    assert trained.get_parameter("0.weight").grad is not None


def test_exported_programs_and_captured_graphs_are_taken_as_they_are():
    x, model = torch.randn(2, 3, 8, 8), conv_net().eval()
    program = torch.export.export(model, (x,))
    for source in (program, program.module(), program.module(check_guards=False), capture(model, x)):
        captured = capture(source, x)
        assert isinstance(captured, CapturedModule)
        assert captured is not source
        assert captured.code == capture(model, x).code
        assert not captured.training
        assert torch.equal(captured(x), model(x))
        assert captured.get_parameter("0.weight") is model[0].weight
        with pytest.raises(CaptureError, match=r"size\(\)\[0\] == 2"):
            captured(torch.randn(1, 3, 8, 8))
    assert capture(torch.export.export(conv_net(), (x,))).training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: capture(conv_net(), {"inputs": 1}),
            r"\(inputs=\.\.\.\): missing a required argument",
        ),
        (lambda: capture(conv_net(), ()), r"forward\(input\) cannot be called .* missing a required argument: 'input'"),
        (lambda: capture(nn.Linear(3, 4), torch.ones(2)), r"could not capture Linear.*\n.*"),
        (lambda: capture(F.relu, torch.ones(2)), "cannot capture a function: give an nn.Module"),
        (lambda: as_graph_module(conv_net()), r"Sequential: call capture\(model, example_inputs\) first"),
        (lambda: as_graph_module(torch.fx.symbolic_trace(conv_net())), "is a call of Conv2d"),
        (
            lambda: capture(nn.Linear(3, 4), torch.ones(2, 3), dynamic_shapes=({1: Dim("n")},)),
            r"(?s)Suggested fixes.*n = 3.*change dynamic_shapes",
        ),
        (
            lambda: capture(capture(nn.Linear(3, 4), torch.ones(2, 3)), dynamic_shapes=()),
            "dynamic_shapes has no effect",
        ),
        (
            lambda: capture(torch.export.export(nn.Linear(3, 4), (torch.ones(2, 3),)), torch.ones(1, 3)),
            r"input.size\(\)\[0\] == 2",
        ),
    ],
)
def test_what_cannot_be_captured_says_what_to_do(call, message):
    with pytest.raises(CaptureError, match=message):
        call()


def test_a_symbolically_traced_module_is_captured_like_any_module():
    x = torch.randn(2, 3, 8, 8)
    traced = torch.fx.symbolic_trace(conv_net().eval())
    assert not is_captured(traced)
    captured = capture(traced, x)
    assert is_captured(captured)
    assert torch.equal(captured(x), traced(x))


def test_a_captured_model_exports_again_and_compiles():
    x, model = torch.randn(2, 3, 8, 8), conv_net().eval()
    captured = capture(model, x, dynamic_shapes=({0: Dim("batch")},))
    program = torch.export.export(captured, (x,), dynamic_shapes=({0: Dim("batch")},))
    assert torch.equal(program.module()(torch.ones(5, 3, 8, 8)), model(torch.ones(5, 3, 8, 8)))
    assert torch.equal(torch.compile(captured, backend="eager")(x), model(x))


def test_one_tensor_given_for_two_inputs_is_two_inputs():
    class Difference(nn.Module):
        def forward(self, x, y, *, z):
            return x * 4 - y * 2 - z

    one = torch.randn(2)
    captured = capture(Difference().eval(), (one, one), {"z": one})
    x, y, z = torch.randn(3, 2).unbind()
    assert torch.equal(captured(x, y, z=z), x * 4 - y * 2 - z)
