"""Mixes: the graph of each is what its points say, under quantizers of ours and of others, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quant2e
from quant2e.accuracy.op_groups import op_groups
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.accuracy.tuning.alternatives import alternatives_of
from quant2e.accuracy.tuning.space.candidates import Candidates
from quant2e.accuracy.tuning.space.families import space_of
from quant2e.accuracy.tuning.space.space import FLOAT_PICK, Mix
from quant2e.calibration.feed import Feed
from quant2e.graph.captured.calls import Call
from quantizers import X86InductorQuantizer, XNNPACKQuantizer
from tests.quant2e.annotators import products


class Block(nn.Module):
    """A convolution and its relu, a pool on its scale, a concatenation, a residual, tied linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.tied = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(torch.relu(self.first(x)), 2)
        x = torch.cat([x, torch.relu(self.second(x)) + x], 1).mean((2, 3))
        return self.head(self.tied(torch.tanh(self.tied(x))))


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 2, 8, 8, generator=generator) for _ in range(4)]


def candidates(model: nn.Module, batches, **quantizers) -> Candidates:
    captured = quant2e.capture(model.eval(), (batches[0],))
    alternatives = alternatives_of(captured, quantizers, Feed(batches, captured), Call((batches[0],), {}))
    return Candidates(captured=captured, space=space_of(alternatives), example=Call((batches[0],), {}))


def everything(made: Candidates, family: int = 0) -> Mix:
    return Mix(family, tuple(group.options[0] for group in made.space.families[family].groups))


QUANTIZERS = {
    "xnnpack static": lambda: XNNPACKQuantizer().set_global("w8a8"),
    "xnnpack dynamic": lambda: XNNPACKQuantizer().set_global("w8a8-dynamic"),
    "x86 static": lambda: X86InductorQuantizer().set_global("w8a8"),
    "a guest": products,
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_mixes_of_one_quantizer(name):
    batches = data()
    made = candidates(Block(), batches, q=QUANTIZERS[name]())
    (alternative,) = made.space.families[0].alternatives
    x = torch.randn(4, 2, 8, 8)
    whole, nothing = everything(made), made.space.all_float()
    converted = quant2e.convert_pt2e(alternative.prepared)
    assert torch.equal(made.model(whole)(x), converted(x))
    assert made.model(whole).report.verdicts == quant2e.report_of(converted).verdicts
    assert torch.equal(made.model(nothing)(x), made.captured(x))
    assert made.model(nothing).report.quantized_ops == 0
    for index, group in enumerate(made.space.families[0].groups):
        left = made.model(whole.with_pick(index, FLOAT_PICK))
        assert {v.op.name for v in left.report.verdicts if v.reason == "left float by tune"} == set(group.ops)
        alone = made.model(nothing.with_pick(index, group.options[0]))
        assert {v.op.name for v in alone.report.verdicts if v.quantized} == set(group.ops)
        assert not torch.equal(left(x), made.captured(x))
        assert not torch.equal(alone(x), made.captured(x))


def test_a_mix_computes_what_its_points_do_in_the_simulated_graph():
    batches = data()
    made = candidates(Block(), batches, q=XNNPACKQuantizer().set_global("w8a8"))
    (alternative,) = made.space.families[0].alternatives
    simulated = SimulatedGraph(alternative.prepared)
    groups = {group.ops[0]: group for group in op_groups(simulated, alternative.report)}
    x, generator = torch.randn(4, 2, 8, 8), torch.Generator().manual_seed(0)
    for _ in range(8):
        on = torch.randint(0, 2, (len(made.space.families[0].groups),), generator=generator).tolist()
        picks = tuple("q" if one else FLOAT_PICK for one in on)
        chosen = [groups[g.name].points for g, one in zip(made.space.families[0].groups, on, strict=True) if one]
        with simulated.rounding(frozenset().union(*chosen)), torch.no_grad():
            wanted = simulated(x)
        assert torch.equal(made.model(Mix(0, picks))(x), wanted)


def kinds(model: quant2e.QuantizedModel) -> dict[str, str]:
    return {verdict.op.name: verdict.kind for verdict in model.report.verdicts}


def quantizes(model) -> int:
    graph = model.module if isinstance(model, quant2e.QuantizedModel) else model
    return sum("quantize_per" in str(node.target) for node in graph.graph.nodes)


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 8, generator=generator) for _ in range(4)]


def test_two_quantizers_side_by_side_are_one_that_is_configured_so():
    batches = rows()
    tensor, channel = "w8a8-tensor", "w8a8"
    made = candidates(
        Row(), batches, tensor=XNNPACKQuantizer().set_global(tensor), channel=XNNPACKQuantizer().set_global(channel)
    )
    assert len(made.space.families) == 1
    mixed = made.model(Mix(0, ("tensor", "channel", "tensor")))
    wanted = quant2e.quantize(
        Row().eval(), batches[:1], XNNPACKQuantizer().set_global(tensor).set_module_name("b", channel), batches
    )
    assert torch.equal(mixed(batches[0]), wanted(batches[0]))
    assert quantizes(mixed) == quantizes(wanted)
    assert mixed.encodings.quantizer == "XNNPACKQuantizer"


def test_static_and_dynamic_side_by_side():
    batches = rows()
    made = candidates(
        Row(),
        batches,
        static=XNNPACKQuantizer().set_global("w8a8"),
        dynamic=XNNPACKQuantizer().set_global("w8a8-dynamic"),
    )
    mixed = made.model(Mix(0, ("static", "dynamic", "float")))
    assert kinds(mixed) == {"linear": "static", "linear_1": "dynamic", "linear_2": "float"}
    quantizer = XNNPACKQuantizer().set_module_name("a", "w8a8").set_module_name("b", "w8a8-dynamic")
    wanted = quant2e.quantize(Row().eval(), batches[:1], quantizer, batches)
    assert torch.equal(mixed(batches[0]), wanted(batches[0]))


def test_quantizers_that_rewrite_the_model_differently_are_families():
    class Rescaled(XNNPACKQuantizer):
        def transform_for_annotation(self, model):
            graph = super().transform_for_annotation(model)
            node = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default)
            with graph.graph.inserting_after(node):
                again = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.0))
            again.meta = dict(node.meta)
            node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
            return graph

    batches = rows()
    plain, other = XNNPACKQuantizer().set_global("w8a8"), Rescaled().set_global("w8a8")
    made = candidates(Row(), batches, plain=plain, other=other)
    assert [len(family.alternatives) for family in made.space.families] == [1, 1]
    model = Row().eval()
    wanted = model(batches[0]).detach()
    result = quant2e.tune(
        model,
        batches[:1],
        {"plain": plain, "other": other},
        batches,
        lambda m: 1.0 - float((m(batches[0]) - wanted).norm() / wanted.norm()),
        max_drop=0.05,
    )
    assert result.met
    assert result.best.mix.family in {0, 1}


def test_bodies_of_control_flow_are_one_group():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.cond(x.sum() > 0, self.a.forward, self.b.forward, (x,)))

    batches = rows()
    made = candidates(Branch(), batches, q=XNNPACKQuantizer().set_global("w8a8"))
    *outer, inside = made.space.families[0].groups
    assert [group.name for group in outer] == ["linear"]
    assert len(inside.ops) == 2
    assert all("." in op for op in inside.ops)
    nothing = made.space.all_float()
    assert torch.equal(made.model(nothing)(batches[0]), made.captured(batches[0]))
    alone = made.model(nothing.with_pick(len(outer), "q"))
    assert not torch.equal(alone(batches[0]), made.captured(batches[0]))
    assert {op for op, kind in kinds(alone).items() if kind == "static"} == set(inside.ops)
    whole = quant2e.convert_pt2e(made.space.families[0].alternatives[0].prepared)
    assert torch.equal(made.model(everything(made))(batches[0]), whole(batches[0]))


class Unbalanced(nn.Module):
    """Rows of the first layer span two decades, which the second undoes: what equalization is for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        spread = torch.logspace(-1.5, 1.5, 16)
        self.first.weight.data *= spread[:, None]
        self.first.bias.data *= spread
        self.second.weight.data /= spread

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_algorithms_are_one_more_way_to_quantize():
    batches, model = rows(), Unbalanced().eval()
    wanted = model(batches[0]).detach()

    def evaluate(module) -> float:
        return 1.0 - float((module(batches[0]) - wanted).norm() / wanted.norm())

    quantizer = XNNPACKQuantizer().set_global("w8a8-tensor")
    plain = quant2e.tune(model, batches[:1], quantizer, batches, evaluate, max_drop=0.03)
    result = quant2e.tune(model, batches[:1], quantizer, batches, evaluate, max_drop=0.03, algorithms=["equalize"])
    assert plain.left_float
    assert result.met
    assert result.left_float == ()
    assert set(result.choices.values()) == {"mended"}
    assert [step.name for step in result.model.report.algorithms] == ["equalize"]
    assert result.model.encodings.quantizer == "XNNPACKQuantizer"
    with pytest.raises(quant2e.Quant2eError, match="no algorithm 'equalise'"):
        quant2e.tune(model, batches[:1], quantizer, batches, evaluate, algorithms=["equalise"])


def test_names_of_quantizers_may_begin_with_each_other():
    static = {"w8": XNNPACKQuantizer(), "w8, x86": X86InductorQuantizer()}
    quantizers = {name: quantizer.set_global("w8a8") for name, quantizer in static.items()}
    made = candidates(Unbalanced(), rows(), **quantizers)
    by = {
        alternative.name: made.model(made.space.all_of(index, alternative.name)).encodings.quantizer
        for index, family in enumerate(made.space.families)
        for alternative in family.alternatives
    }
    assert by == {"w8": "XNNPACKQuantizer", "w8, x86": "X86InductorQuantizer"}
    with pytest.raises(quant2e.Quant2eError, match="'x86' names a list of algorithms and something else"):
        quant2e.tune(Unbalanced(), rows()[:1], quantizers, rows(), float, algorithms={"x86": ["equalize"]})
