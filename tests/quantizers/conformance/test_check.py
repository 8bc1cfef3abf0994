"""Our own quantizers pass the conformance check; the check itself repeats, prints, and says what it could not do."""

import builtins
import random

import pytest
import torch

import quant2e
from quant2e import AnnotationError, Arg, HistogramObserver, QuantizationSpec, op
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    Follow,
    Rule,
    Same,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)
from quantizers.conformance import check
from quantizers.conformance.capabilities import patterns_to_test
from quantizers.conformance.generate import by_dice, composition, random_programs
from quantizers.conformance.program_builder import shapes_of
from tests.quantizers.conformance.broken import ACT, Sound, of

aten = torch.ops.aten


def xnnpack(**options):
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, **options))


def x86(**options):
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(**options))


OURS = {
    "XNNPACK, static": xnnpack,
    "XNNPACK, dynamic": lambda: xnnpack(is_dynamic=True),
    "XNNPACK, 4 bits in groups": lambda: xnnpack(is_dynamic=True, weight_qmin=-8, weight_qmax=7, group_size=32),
    "x86, static": x86,
    "x86, dynamic": lambda: x86(is_dynamic=True),
    "x86, weights in groups": lambda: X86InductorQuantizer().set_global("w4-g32"),
    "embedding": EmbeddingQuantizer,
    "embedding, then XNNPACK": lambda: ComposableQuantizer([EmbeddingQuantizer(), xnnpack(is_dynamic=True)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_ours_pass(name):
    report = check(OURS[name], examples=4, seconds=600)
    assert report.passed, str(report)
    assert report.complete
    assert str(report).startswith(f"{report.quantizer}: passed ({report.examples} graphs, seed 0)")


@pytest.mark.slow
def test_a_rule_that_asks_for_what_reads_its_result_is_reached():
    assert check(x86, examples=1, seconds=600, seed=22).passed


@pytest.mark.slow
def test_an_index_that_rounding_changes_is_no_mistake_of_the_quantizer():
    report = check(OURS["XNNPACK, 4 bits in groups"], seed=12, seconds=600)
    assert report.passed, str(report)


def test_equal_seeds_give_equal_graphs():
    known = patterns_to_test(Sound())
    first, again, other = (list(map(str, random_programs(known, 5, seed))) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_programs_run_and_shrink_to_programs_that_run():
    known = patterns_to_test(xnnpack())
    for seed in range(12):
        program = composition(known, by_dice(seed))
        program.module()(*program.batches(1)[0])
        for smaller in program.smaller(shapes_of(program)):
            assert len(smaller.steps) < len(program.steps) or len(smaller.outputs) < len(program.outputs)
            results = smaller.module()(*smaller.batches(1)[0])
            assert [r.shape for r in results] == [
                shapes_of(smaller)[i] or r.shape for i, r in zip(smaller.outputs, results, strict=True)
            ]


@pytest.mark.parametrize("seed", [3, 4])
def test_what_comes_and_goes_has_a_small_graph_too(seed):
    dice = random.Random(seed)

    class Forgetful(Sound):
        def annotate(self, model):
            annotated = [n for n in super().annotate(model).graph.nodes if n.meta.get(ANNOTATION) is not None]
            if annotated and dice.random() < 0.5:
                del dice.choice(annotated).meta[ANNOTATION]
            return model

    found = [f for f in check(Forgetful, examples=4, seconds=600).errors if f.kind == "not deterministic"]
    assert found
    assert min(len(f.reproducer.steps) for f in found) == 1


def test_a_program_prints():
    program = composition(patterns_to_test(Sound()), lambda options: options[0])
    assert str(program).splitlines() == [
        "x0: float32[2, 4, 8, 8]",
        "v0 = conv2d.default(x0, weight[2, 4, 3, 3], bias[2], [1, 1], [0, 0], [1, 1], 1)",
        "v1 = relu.default(v0)",
        "v2 = conv2d.default(v1, weight[2, 2, 3, 3], bias[2], [1, 1], [0, 0], [1, 1], 1)",
        "v3 = relu.default(v2)",
        "return v3",
    ]


class Foreign:
    """A quantizer in PT2E's style that does not say what it takes: int8 linear, from a list of targets."""

    def transform_for_annotation(self, model):
        return model

    def annotate(self, model):
        for node in model.graph.nodes:
            if node.target is aten.linear.default and ANNOTATION not in node.meta:
                weight = QuantizationSpec(torch.int8, HistogramObserver, -127, 127, torch.per_tensor_symmetric)
                node.meta[ANNOTATION] = QuantizationAnnotation(
                    {node.args[0]: ACT, node.args[1]: weight}, ACT, _annotated=True
                )
        return model

    def validate(self, model):
        pass


def test_of_quantizers_that_do_not_tell_common_ops_are_asked():
    report = check(Foreign, examples=1, seconds=600)
    assert report.passed, str(report)
    assert report.notes == ("it does not declare all its rules: graphs are made of ops in common use",)
    assert report.examples >= 19


def test_rules_whose_ops_cannot_be_written_are_warnings():
    strange = Rule(op(torch.ops.aten.grid_sampler.default)(Arg("x"), Arg("y")), {"x": ACT}, ACT, name="sampler")
    report = check(of(*Sound.rules, strange), examples=1, seconds=600)
    assert report.passed, str(report)
    assert [(f.kind, f.rule, f.warning) for f in report.findings] == [("not generated", "sampler", True)]
    assert "warning: not generated [rule sampler]: no call of grid_sampler(x, y) can be written" in str(report)


def test_what_is_no_quantizer_is_refused():
    with pytest.raises(AnnotationError, match="is no quantizer, and makes none"):
        check(3)
    with pytest.raises(AnnotationError, match="needs a method annotate"):
        check(dict)


def test_it_stops_in_time_and_says_so():
    report = check(Sound, seconds=0)
    assert not report.complete
    assert not report.passed
    assert report.examples == 0
    assert "stopped by the time limit after 0 graphs" in str(report)


def test_without_hypothesis_it_says_what_to_install(monkeypatch):
    imported = builtins.__import__

    def without(name, *rest, **options):
        if name == "hypothesis":
            raise ImportError(name)
        return imported(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(quant2e.Quant2eError, match=r"pip install quant2e\[conformance\]"):
        check(of(Rule(op(aten.add.Tensor)(Arg("x"), Arg("y")), {"x": ACT, "y": ACT}, ACT, name="add")))


def test_a_rule_may_refer_forward():
    x, y = Arg("x"), Arg("y")
    forward = Rule(op(aten.cat.default)(x), {"x": Follow(ACT)}, Same("x"), name="cat")
    pair = Rule(op(aten.maximum.default)(x, y), {"x": Same("y"), "y": ACT}, Same("y"), name="maximum")
    report = check(of(*Sound.rules, forward, pair), examples=2, seconds=600)
    assert report.passed, str(report)
