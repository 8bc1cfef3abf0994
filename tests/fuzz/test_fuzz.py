"""The fuzzer's short run, the same programs every time; what it found before; that its oracles see what is wrong."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import quant2e
from quantizers import XNNPACKQuantizer
from quantizers.conformance.capabilities import patterns_to_test
from quantizers.conformance.generate import by_dice
from tests.fuzz import noise, oracles, relations
from tests.fuzz.cases import CASES
from tests.fuzz.examine import examine, smallest
from tests.fuzz.generate import composed, programs
from tests.fuzz.program import parse
from tests.fuzz.run import RefusedError, Run, outputs
from tests.fuzz.settings import SETTINGS

EXAMPLES = 4
"""Programs for each quantizer."""


def run(program, setting, number, checks):
    """Fail with the smallest program that shows a failure, ready for a row of `CASES`."""
    try:
        failures = examine(program, setting, checks, number)
    except RefusedError:
        return False
    for failure in failures:
        smaller, failure = smallest(program, failure, setting, checks, number)
        pytest.fail(f"{failure}\nsetting {setting}, seed {number}\n{smaller}")
    return True


@pytest.mark.parametrize("setting", SETTINGS)
def test_programs(setting):
    found = programs(SETTINGS[setting](), EXAMPLES, seed=0)
    first = EXAMPLES * list(SETTINGS).index(setting)  # so that all oracles have their turn
    judged = [
        run(program, setting, number, (*oracles.ALWAYS, *oracles.IN_TURN[(first + number) % len(oracles.IN_TURN)]))
        for number, program in enumerate(found)
    ]
    assert sum(judged) >= EXAMPLES // 2, "most programs are refused, so nothing is tried"


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("target", oracles.LOWERED)
@pytest.mark.parametrize("setting", ["xnnpack", "x86"])
def test_lowered_programs(setting, target):
    pytest.importorskip({"onnx": "onnxruntime"}.get(target, target) if target != "inductor" else "torch")
    for number, program in enumerate(programs(SETTINGS[setting](), 6, seed=5)):
        run(program, setting, number, (oracles.LOWERED[target],))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_was_found(case):
    checks = [check for row in (oracles.ALWAYS, *oracles.IN_TURN, tuple(oracles.LOWERED.values())) for check in row]
    program = parse(case.program)
    named = [check for check in checks if check.__name__ == case.oracle]
    assert examine(program, case.setting, named, case.seed) == []


def drawn(count):
    """Programs by dice, which is fast, for every quantizer."""
    for name, make in SETTINGS.items():
        patterns = patterns_to_test(make())
        for number in range(count):
            if (program := composed(patterns, by_dice(random.Random(name).randrange(10**6) + number))) is not None:
                yield program


def test_programs_are_many_and_are_text():
    ops, features = set(), set()
    for program in drawn(60):
        assert str(parse(str(program))) == str(program)
        ops |= {step.name for step in program.steps if "." in step.name}
        features |= {step.name for step in program.steps if "." not in step.name} | {
            given.kind for given in program.inputs
        }
        features |= {"varies"} if program.varies else set()
        features |= {role for role in program.roles() if "_" in role}
    assert len(ops) >= 90
    assert features >= {
        "branch",
        "loop",
        "recurrence",
        "remember",
        "count",
        "attention",
        "batch_norm",
        "bool",
        "outlier",
    }
    assert features >= {"varies", "weight_zero", "weight_outlier", "zeros", "far", "large", "small", "equal", "whole"}


PROGRAM = """
x0: float32[4, 8, 6, 6] normal
v0 = conv2d.default(x0, weight[8, 8, 3, 3], bias[8], [1, 1], [1, 1])
v1 = relu.default(v0)
v2 = add.Tensor(v1, x0)
return v2
"""


def quantized(change):
    """A run whose Q/DQ graph was changed afterwards."""
    run = Run(parse(PROGRAM), "xnnpack").go()
    for node in run.converted.graph.nodes:
        change(run.converted, node)
    run.converted.recompile()
    run.found = outputs(run.converted, run.batches)
    return run


def wider(_gm, node):
    """Steps of the activations that are four times as wide as the model of noise is told."""
    if node.target == torch.ops.quantized_decomposed.quantize_per_tensor.default:
        node.target = coarse


def coarse(x, scale, *rest):
    return torch.ops.quantized_decomposed.quantize_per_tensor.default(
        (x / (4 * scale)).round() * 4 * scale, scale, *rest
    )


def test_the_model_of_noise_holds_and_sees_coarse_rounding(monkeypatch):
    assert list(oracles.rounding_noise(quantized(lambda gm, node: None))) == []
    monkeypatch.setitem(noise._UNDO, coarse, torch.ops.quantized_decomposed.dequantize_per_tensor.default)
    monkeypatch.setattr(noise, "QUANTIZE", noise.QUANTIZE | {coarse})
    (message,) = oracles.rounding_noise(quantized(wider))
    assert "times what rounding predicts" in message


def test_oracles_see_a_changed_graph():
    def shifted(gm, node):
        if node.target is torch.ops.aten.add.Tensor:
            node.target = torch.ops.aten.sub.Tensor

    run = quantized(shifted)
    assert list(oracles.floor(run)) != []
    assert list(oracles.layout(run)) == []
    next(run.model.parameters()).data.add_(1)
    assert list(oracles.purity(run)) == ["the model's tensors were changed"]


class Off(nn.Module):
    """A model whose results are all one too large."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return [x + 1 for x in self.model(*inputs)]


@pytest.mark.parametrize("relation", relations.RELATIONS, ids=lambda relation: relation.__name__)
def test_relations_hold_and_see_what_is_wrong(relation, monkeypatch):
    run = Run(parse(f"{PROGRAM}batch varies"), "xnnpack").go()
    assert list(relation(run)) == []
    quantize = Run.quantize
    monkeypatch.setattr(Run, "quantize", lambda *arguments: Off(quantize(*arguments)))
    assert len(list(relation(run))) == 1


def test_nothing_is_asked_where_the_float_model_keeps_no_relation(monkeypatch):
    program = "x0: float32[4, 6] normal\nv0 = softmax.int(x0, 0)\nv1 = linear.default(v0, weight[3, 6])\nreturn v1"
    run = Run(parse(program), "xnnpack").go()
    monkeypatch.setattr(Run, "quantize", lambda *_: pytest.fail("it was quantized again"))
    relations_of_all_rows = (relations.scaled, relations.joined_batches)
    assert [list(relation(run)) for relation in relations_of_all_rows] == [[], []]


def test_a_failure_is_made_small(monkeypatch):
    def no_add(run):
        if any(node.target is torch.ops.aten.add.Tensor for node in run.captured.graph.nodes):
            yield "it adds"

    program = parse(PROGRAM)
    (failure,) = examine(program, "xnnpack", (no_add,))
    smaller, again = smallest(program, failure, "xnnpack", (no_add,), 0)
    assert [step.name for step in smaller.steps] == ["add.Tensor"]
    assert again.message == "it adds"


def test_an_unknown_error_is_a_failure_and_one_with_a_reason_is_not(monkeypatch):
    monkeypatch.setattr(quant2e, "prepare_pt2e", lambda *_: 1 / 0)
    (failure,) = examine(parse(PROGRAM), "xnnpack", ())
    assert str(failure) == "raises: prepare: ZeroDivisionError: division by zero"
    monkeypatch.undo()
    with pytest.raises(RefusedError, match="the float model"):
        examine(parse("x0: float32[2, 3] normal\nv0 = view.default(x0, [7])\nreturn v0"), "xnnpack", ())


def test_equal_seeds_give_equal_programs():
    quantizer = XNNPACKQuantizer().set_global("w8a8")
    first, second = (list(map(str, programs(quantizer, 8, seed=3))) for _ in range(2))
    assert first == second
