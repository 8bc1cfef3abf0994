"""Composition: precedence, interference, hooks, foreign children."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from quant2e import AnnotationError, Quantizer, capture, convert_pt2e, prepare_pt2e, prepare_qat_pt2e, quantize
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation
from quant2e.observers.fake_quant import FakeQuantizeBase
from quant2e.report.record import RECORD_KEY
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    OperatorConfig,
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


class Bare:
    """A child with nothing but the one method it needs."""

    def annotate(self, gm):
        return gm


def test_a_child_needs_only_annotate():
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


# ------------------------------------------------------------ odd children


def test_compositions_nest():
    inner = ComposableQuantizer([XNNPACKQuantizer().set_module_name("0", DYNAMIC), Foreign()])
    nested = ComposableQuantizer([EmbeddingQuantizer(), inner, XNNPACKQuantizer().set_global(STATIC)])
    flat = ComposableQuantizer(
        [XNNPACKQuantizer().set_module_name("0", DYNAMIC), XNNPACKQuantizer().set_global(STATIC)]
    )
    assert annotations(model(), ROWS, nested) == annotations(model(), ROWS, flat)
    assert nested.notes == ["Foreign annotated nothing", "EmbeddingQuantizer annotated nothing"]
    assert [*nested.quantization_capabilities()] == [
        "EmbeddingQuantizer", "ComposableQuantizer > XNNPACKQuantizer", "XNNPACKQuantizer",
    ]  # fmt: skip


def test_a_child_may_come_twice():
    q = XNNPACKQuantizer().set_global(STATIC)
    twice = ComposableQuantizer([q, q])
    gm = annotated(model(), ROWS, twice)
    assert annotations(model(), ROWS, q) == annotations(model(), ROWS, ComposableQuantizer([q, q]))
    assert twice.notes == ["XNNPACKQuantizer (2 of 2) annotated nothing"]
    assert reasons(gm, twice)["softmax"] == "XNNPACK computes it in float"


class Pruning(Foreign):
    """Removes nodes while it annotates."""

    def __init__(self, drop=lambda node: False):
        super().__init__()
        self.drop = drop

    def annotate(self, gm):
        for node in reversed(list(gm.graph.nodes)):
            if self.drop(node):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
        return gm


class Rebuilding(Foreign):
    def transform_for_annotation(self, gm):
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        return torch.fx.GraphModule(gm, graph)


def test_a_child_that_rebuilds_the_graph():
    composed = ComposableQuantizer([XNNPACKQuantizer().set_global(STATIC), Rebuilding()])
    prepared = prepare_pt2e(capture(model().eval(), ROWS), composed)
    prepared(*ROWS)
    alone = prepare_pt2e(capture(model().eval(), ROWS), XNNPACKQuantizer().set_global(STATIC))
    alone(*ROWS)
    (rebuilt,) = convert_pt2e(prepared)(*ROWS)  # a copied graph answers with a tuple: how to unpack it was not copied
    assert torch.equal(rebuilt, convert_pt2e(alone)(*ROWS))


def test_a_child_that_removes_a_node_of_another():
    composed = ComposableQuantizer(
        [XNNPACKQuantizer().set_global(STATIC), Pruning(drop=lambda node: node.name == "relu")]
    )
    with pytest.raises(
        AnnotationError, match=r"Pruning removed the node, and with it the annotation that XNNPACK\w+ made on 'relu'"
    ):
        annotated(model(), ROWS, composed)


def test_a_spec_that_is_exchanged_for_an_equal_one_is_no_interference():
    def rewrite(node):
        if (note := node.meta.get(ANNOTATION)) is not None:
            node.meta[ANNOTATION] = copy.copy(note)

    composed = ComposableQuantizer([XNNPACKQuantizer().set_global(STATIC), Foreign(rewrite)])
    assert annotations(model(), ROWS, composed) == annotations(model(), ROWS, XNNPACKQuantizer().set_global(STATIC))


def test_a_setting_whose_ops_an_earlier_child_took_is_noted():
    later = XNNPACKQuantizer().set_global("w8a8").set_module_name("0", "w8a8-dynamic")
    composed = ComposableQuantizer([XNNPACKQuantizer().set_module_name("0", STATIC), later])
    annotated(model(), ROWS, composed)
    assert composed.notes == ["module name '0' quantizes nothing: an earlier quantizer took 'linear'"]


def test_static_dynamic_and_weight_only_in_one_graph():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(16, 8)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, ids):
            return self.second(torch.tanh(self.first(self.table(ids))))

    ids = (torch.arange(6).reshape(2, 3),)
    composed = ComposableQuantizer(
        [
            EmbeddingQuantizer().set_global("w8"),
            XNNPACKQuantizer().set_module_name("first", "w8a8-dynamic"),
            XNNPACKQuantizer().set_global("w8a8"),
        ]
    )
    torch.manual_seed(0)
    net = Mixed().eval()
    result = quantize(net, ids, composed, [ids])
    kinds = {v.op.name: v.kind for v in result.report.verdicts}
    assert kinds == {"embedding": "weight-only", "linear": "dynamic", "tanh": "float", "linear_1": "static"}
    assert (result(*ids) - net(*ids)).abs().max() < 0.05


def test_training_static_dynamic_and_weight_only_in_one_graph():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(16, 8)
            self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, ids):
            return self.third(torch.tanh(self.second(torch.tanh(self.first(self.table(ids))))))

    composed = ComposableQuantizer(
        [
            EmbeddingQuantizer().set_global("w8"),
            XNNPACKQuantizer().set_module_name("first", "w8a8-dynamic").set_module_name("second", "w8a8"),
            XNNPACKQuantizer().set_global("w8a8-qat"),
        ]
    )
    torch.manual_seed(0)
    net, ids = Mixed().train(), (torch.arange(6).reshape(2, 3),)
    prepared = prepare_qat_pt2e(capture(net, ids), composed)
    trains = [name for name, module in prepared.named_modules() if isinstance(module, FakeQuantizeBase)]
    assert len(trains) == 3  # input, weight and output of the third linear
    prepared(*ids).sum().backward()
    converted = convert_pt2e(prepared.eval())
    kinds = {v.op.name: v.kind for v in converted.meta[RECORD_KEY].report.verdicts}
    assert kinds == {
        "embedding": "weight-only", "linear": "dynamic", "linear_1": "static", "linear_2": "static",
        "tanh": "float", "tanh_1": "float",
    }  # fmt: skip
    assert (converted(*ids) - net.eval()(*ids)).abs().max() < 0.05


# ------------------------------------------------------------ what a composition can do


def test_capabilities_are_a_union_with_precedence():
    class Told:
        def __init__(self, **rules):
            self.rules = rules

        def annotate(self, gm):
            return gm

        def quantization_capabilities(self):
            return self.rules

    class Pt2e(Bare):
        @classmethod
        def get_supported_operators(cls):
            return [OperatorConfig(STATIC, [[nn.Conv2d, nn.ReLU], [torch.mm]]), OperatorConfig(DYNAMIC, [[torch.mm]])]

    able = ComposableQuantizer(
        [Told(mac=["conv", "linear"]), Told(product=["linear"], sum=["add"]), Bare(), Pt2e()]
    ).quantization_capabilities()
    assert [(row.quantizer, row.rule, row.pattern, row.after) for row in able.rows] == [
        ("Told (1 of 4)", "mac", "conv", ()),
        ("Told (1 of 4)", "mac", "linear", ()),
        ("Told (2 of 4)", "product", "linear", ("Told (1 of 4)",)),
        ("Told (2 of 4)", "sum", "add", ()),
        ("Pt2e", "supported operators", "Conv2d + ReLU", ()),
        ("Pt2e", "supported operators", "mm", ()),
    ]
    assert str(able).splitlines() == [
        "   quantizer      rule                 pattern        unless taken by",
        "1  Told (1 of 4)  mac                  conv",
        "1  Told (1 of 4)  mac                  linear",
        "2  Told (2 of 4)  product              linear         Told (1 of 4)",
        "2  Told (2 of 4)  sum                  add",
        "3  Pt2e           supported operators  Conv2d + ReLU",
        "3  Pt2e           supported operators  mm",
        "Bare does not tell what it quantizes",
    ]


def test_capabilities_of_backends_with_a_precedence():
    able = ComposableQuantizer([XNNPACKQuantizer(), XNNPACKQuantizer()]).quantization_capabilities()
    assert able["XNNPACKQuantizer (1 of 2)"] == XNNPACKQuantizer.quantization_capabilities()
    second = [row for row in able.rows if row.quantizer == "XNNPACKQuantizer (2 of 2)"]
    assert {row.after for row in second} == {("XNNPACKQuantizer (1 of 2)",)}


# ------------------------------------------------------------ children of other libraries

STATIC_KINDS = {"embedding": "float", **dict.fromkeys(["linear", "relu", "linear_1", "add", "linear_2"], "static")}
LOOKUP = {"embedding": "weight-only"}
DYNAMIC_FIRST = {"linear": "dynamic", "relu": "float"}


@pytest.mark.slow
def test_children_of_other_libraries_in_both_directions():
    pytest.importorskip("executorch")
    runner = Path(__file__).with_name("foreign_children.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(runner)], capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert "Conv2d + ReLU" in found.pop("capabilities")
    assert [name for name, facts in found.items() if not 0 < facts.pop("error") < 0.02] == []
    assert found == {
        "ours, executorch": STATIC_KINDS | LOOKUP,
        "torchao, ours": STATIC_KINDS | LOOKUP,
        "executorch dynamic, ours": STATIC_KINDS | DYNAMIC_FIRST,
        "ours dynamic, executorch": STATIC_KINDS | DYNAMIC_FIRST,
        "torchao x86, ours": STATIC_KINDS | {"add": "float"},
        "torchao's composition, ours": STATIC_KINDS | LOOKUP,
        "ours in torchao's composition": STATIC_KINDS | LOOKUP,
    }
