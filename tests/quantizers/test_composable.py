"""Composition: precedence, interference, hooks, foreign children."""

import pytest
import torch
from torch import nn

from quant2e import AnnotationError, Quantizer, capture, convert_pt2e, prepare_pt2e
from quant2e.specs import ANNOTATION, QuantizationAnnotation
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)
from tests.quantizers.models import ROWS, annotated, annotations, reasons

STATIC = get_symmetric_quantization_config(is_per_channel=True)
DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Softmax(-1))


class Foreign:
    """A quantizer of another library: PT2E's methods and no common ancestor."""

    def __init__(self, act=lambda node: None):
        self.act, self.calls = act, []

    def transform_for_annotation(self, gm):
        self.calls.append("transform")
        return gm

    def annotate(self, gm):
        self.calls.append("annotate")
        for node in gm.graph.nodes:
            self.act(node)
        return gm

    def validate(self, gm):
        self.calls.append("validate")

    def prepare_obs_or_fq_callback(self, gm, observers):
        self.calls.append(f"callback with {len(observers)} points")


def test_order_is_precedence_and_none_passes_on():
    first = XNNPACKQuantizer().set_module_name("0", DYNAMIC).set_module_name("2", None)
    second = XNNPACKQuantizer().set_global(STATIC)
    text = annotations(model(), ROWS, ComposableQuantizer([first, second])).splitlines()
    assert [line.split("[")[-1] for line in text] == ["dynamic linear]", "linear]"]
    assert annotations(model(), ROWS, ComposableQuantizer([second, first])) == annotations(model(), ROWS, second)


def test_backends_mix_in_one_graph():
    x86 = X86InductorQuantizer().set_module_name("0", get_default_x86_inductor_quantization_config(reduce_range=True))
    both = ComposableQuantizer([x86, XNNPACKQuantizer().set_global(STATIC)])
    prepared = prepare_pt2e(capture(model().eval(), ROWS), both)
    prepared(*ROWS)
    converted = convert_pt2e(prepared)
    kinds = [
        n.args[5] for n in converted.graph.nodes if str(n.target) == "quantized_decomposed.quantize_per_tensor.default"
    ]
    assert kinds[0] == torch.uint8
    assert set(kinds[1:]) == {torch.int8}
    assert any("0..127" in note for note in both.notes)


@pytest.mark.parametrize(
    ("act", "did"),
    [
        (lambda node: node.meta.pop(ANNOTATION, None), "removed"),
        (lambda node: node.meta.update({ANNOTATION: QuantizationAnnotation()}), "changed"),
        (lambda node: node.meta.get(ANNOTATION) and setattr(node.meta[ANNOTATION], "output_qspec", None), "changed"),
        (lambda node: node.meta.get(ANNOTATION) and node.meta[ANNOTATION].input_qspec_map.clear(), "changed"),
    ],
)
def test_a_child_that_interferes_is_named(act, did):
    composed = ComposableQuantizer([XNNPACKQuantizer().set_global(STATIC), Foreign(act)])
    message = rf"Foreign {did} the annotation that XNNPACKQuantizer made on '(linear|relu|linear_1)'"
    with pytest.raises(AnnotationError, match=message):
        annotated(model(), ROWS, composed)


def test_of_several_of_a_kind_the_place_is_said():
    class Greedy(Foreign):
        pass

    wipe = Greedy(lambda node: node.meta.pop(ANNOTATION, None))
    add = Greedy(lambda node: node.op == "call_function" and node.meta.setdefault(ANNOTATION, QuantizationAnnotation()))
    with pytest.raises(AnnotationError, match=r"Greedy \(2 of 2\) removed the annotation that Greedy \(1 of 2\) made"):
        annotated(model(), ROWS, ComposableQuantizer([add, wipe]))


def test_all_hooks_of_all_children_run():
    children = [Foreign(), Foreign()]
    prepare_pt2e(capture(model().eval(), ROWS), ComposableQuantizer([*children, XNNPACKQuantizer().set_global(STATIC)]))
    calls = ["transform", "annotate", "validate"]
    assert [child.calls[:3] for child in children] == [calls, calls]
    assert all(child.calls[3].startswith("callback with ") for child in children)


def test_a_child_needs_only_annotate():
    class Bare:
        def annotate(self, gm):
            return gm

    composed = ComposableQuantizer([Bare(), XNNPACKQuantizer().set_global(STATIC)])
    assert annotations(model(), ROWS, composed) == annotations(model(), ROWS, XNNPACKQuantizer().set_global(STATIC))


def test_children_see_their_own_errors():
    with pytest.raises(AnnotationError, match="no module named 'typo'"):
        annotated(
            model(),
            ROWS,
            ComposableQuantizer([EmbeddingQuantizer(), XNNPACKQuantizer().set_module_name("typo", STATIC)]),
        )


def test_reasons():
    composed = ComposableQuantizer(
        [EmbeddingQuantizer(), XNNPACKQuantizer().set_global(DYNAMIC).set_module_name("2", None)]
    )
    assert reasons(annotated(model(), ROWS, composed), composed) == {
        "relu": "no dynamic rule covers aten.relu.default",
        "linear_1": "set to float by module name '2'",
        "softmax": "XNNPACK computes it in float",
    }


def test_capabilities_in_order_of_precedence():
    composed = ComposableQuantizer([EmbeddingQuantizer(), Foreign(), XNNPACKQuantizer()])
    assert list(composed.quantization_capabilities()) == ["EmbeddingQuantizer", "XNNPACKQuantizer"]
    assert isinstance(composed, Quantizer)


@pytest.mark.parametrize(("children", "message"), [([], "of no quantizers"), ([STATIC], "is not a quantizer")])
def test_what_is_not_a_composition(children, message):
    with pytest.raises(AnnotationError, match=message):
        ComposableQuantizer(children)
