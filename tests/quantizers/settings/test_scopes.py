"""Which of several settings applies, by table; and what is said about those that never do."""

import re

import pytest
import torch
from torch import nn

from quant2e import AnnotationError, QuantizationSpec, quantize
from quant2e.observers.measuring import MinMaxObserver
from quantizers import (
    EmbeddingQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)
from tests.quantizers.models import ROWS, Of, annotated, reasons
from tests.quantizers.settings.test_module_names import DYNAMIC, FULL, LOW, Block, Stack, chosen, everything

aten = torch.ops.aten
UNSET = everything("float")


def three_dimensional(node):
    return node.target is aten.linear.default and node.args[0].meta["val"].dim() == 3


@pytest.mark.parametrize(
    ("configure", "expected"),
    [
        # globs, whose wildcards match dots; they name the outermost modules that match
        (lambda q: q.set_module_name("blocks.*", LOW), UNSET | dict.fromkeys(["up0", "down0", "up1", "down1"], "low")),
        (lambda q: q.set_module_name("*.up", LOW), UNSET | {"up0": "low", "up1": "low"}),
        (lambda q: q.set_module_name("blocks.[1-9].?p", LOW), UNSET | {"up1": "low"}),
        (lambda q: q.set_module_name("*", LOW), everything("low", functional="float")),
        # regular expressions, for the whole path
        (lambda q: q.set_module_name("re:blocks\\.\\d", LOW),
            UNSET | dict.fromkeys(["up0", "down0", "up1", "down1"], "low")),
        (lambda q: q.set_module_name(re.compile(r".*\.(up|nothing)"), LOW), UNSET | {"up0": "low", "up1": "low"}),
        (lambda q: q.set_module_name_regex(r"head|.*1\.up", LOW), UNSET | {"up1": "low", "head": "low"}),
        # the innermost wins, whether it is spelled exactly or not
        (
            lambda q: q.set_module_name("blocks.*.up", None).set_module_name("blocks", LOW),
            UNSET | {"down0": "low", "down1": "low"},
        ),
        (
            lambda q: q.set_module_name("blocks.0.up", FULL).set_module_name("*up", None).set_module_name("blocks.*",
                LOW),
            UNSET | {"up0": "full", "down0": "low", "down1": "low"},
        ),
        # for one module: exact > glob > regular expression, whatever the order
        (
            lambda q: q.set_module_name("blocks.0", FULL).set_module_name("blocks.*",
                LOW).set_module_name("re:blocks..", None),
            UNSET | {"up0": "full", "down0": "full", "up1": "low", "down1": "low"},
        ),
        # all spellings of tracers and scripts
        (lambda q: q.set_module_name("L['self'].blocks[0].up", LOW), UNSET | {"up0": "low"}),
        (lambda q: q.set_module_name("blocks[1]", LOW), UNSET | {"up1": "low", "down1": "low"}),
        (lambda q: q.set_module_name("L['self'].head", LOW), UNSET | {"head": "low"}),
        # nodes come before modules, a name before a predicate
        (lambda q: q.set_global(FULL).set_module_name("blocks", LOW).set_node("linear_1", None),
         everything("full", up0="low", down0="float", up1="low", down1="low")),
        (lambda q: q.set_node(lambda n: n.name in ("linear", "linear_1"), LOW).set_node("linear",
            FULL).set_module_name("blocks", None),
         UNSET | {"up0": "full", "down0": "low"}),
        # a qualified type before a bare one, an overload before its packet
        (lambda q: q.set_module_type(nn.Linear, FULL).set_module_type("Linear", LOW),
            everything("full", functional="float")),
        (lambda q: q.set_operator_type(aten.linear.default, FULL).set_operator_type(aten.linear, LOW),
            everything("low")),
        # of two that are equally close the later
        (lambda q: q.set_module_name("*.up", LOW).set_module_name("blocks.*p", FULL),
            UNSET | {"up0": "full", "up1": "full"}),
        (lambda q: q.set_module_name("blocks.*p", FULL).set_module_name("*.up", LOW),
            UNSET | {"up0": "low", "up1": "low"}),
        # PT2E's names
        (lambda q: q.set_module_name_qconfig("head", LOW).set_module_type_qconfig(Block, FULL),
            everything("full", head="low", functional="float")),
        (lambda q: q.set_function_type_qconfig(nn.functional.linear, LOW), everything("low")),
    ],
)  # fmt: skip
def test_the_closest_setting_applies(configure, expected):
    assert chosen(configure) == expected


def test_by_the_shape_of_an_input():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.pooled = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.pooled(self.rows(x).mean(1))

    q = XNNPACKQuantizer().set_node(three_dimensional, FULL)
    gm = annotated(Mixed(), (torch.randn(2, 3, 8),), q)
    assert reasons(gm, q) == {"mean": "no configuration covers it", "linear_1": "no configuration covers it"}


def test_every_other_linear():
    q = XNNPACKQuantizer()
    for name in ["linear", "linear_1", "linear_2", "linear_3", "linear_4"][::2]:
        q.set_node(name, FULL)
    assert chosen(lambda _: q) == UNSET | {"up0": "full", "up1": "full", "head": "full"}


def notes(configure, model=None):
    q = configure(XNNPACKQuantizer())
    annotated(model or Stack(), ROWS, q)
    return q.notes


@pytest.mark.parametrize(
    ("configure", "expected"),
    [
        (
            lambda q: q.set_module_name("blocks.0.up", LOW).set_node("linear", FULL),
            ["module name 'blocks.0.up' never applies: its only op 'linear' is covered by node 'linear'"],
        ),
        (
            lambda q: q.set_module_type(nn.Linear, LOW).set_module_name("blocks", FULL).set_module_name("head", None),
            [
                (
                    "module type 'torch.nn.modules.linear.Linear' never applies: its 5 ops 'linear', 'linear_1', "
                    "'linear_2', 'linear_3' … are covered by module name 'blocks' and module name 'head'"
                )
            ],
        ),
        (
            lambda q: q.set_module_name("*.up", LOW).set_module_name("blocks.0.*p", FULL),
            [("module name '*.up' and module name 'blocks.0.*p' name 'linear' equally closely; "
                "the later, module name 'blocks.0.*p', applies")],
        ),
        (lambda q: q.set_module_name("*.up", LOW).set_module_name("blocks.0.*p", LOW), []),
        (
            lambda q: q.set_operator_type(torch.relu, DYNAMIC),
            [("operator 'relu' quantizes nothing: 'relu': no dynamic rule covers aten.relu.default; "
                "'relu_1': no dynamic rule covers aten.relu.default")],
        ),
        (lambda q: q.set_global(FULL).set_module_name("head", None), []),
    ],
)  # fmt: skip
def test_what_never_applies_is_noted(configure, expected):
    assert notes(configure) == expected


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (lambda q: q.set_module_name("block.*", FULL),
            r"module name 'block\.\*' names no op .*; did you mean 'blocks.1'"),
        (lambda q: q.set_module_name("re:bloks", FULL),
            "module name matching 'bloks' names no op in this graph; there is 'blocks'"),
        (lambda q: q.set_module_name("re:(", FULL), "is not a regular expression"),
        (lambda q: q.set_module_name(nn.Linear, FULL), "is not a module name; for classes there is set_module_type"),
        (lambda q: q.set_node("linaer", FULL), "no op in this graph is named 'linaer'; did you mean 'linear'"),
        (lambda q: q.set_node(three_dimensional, FULL), "the predicate three_dimensional names no op in this graph"),
        (lambda q: q.set_node(3, FULL), "neither the name of a node nor a predicate"),
        (lambda q: q.set_node(lambda n: n.args[7], FULL),
            r"the predicate in line \d+ of test_scopes.py failed on '.*IndexError"),
        (lambda q: q.set_filter_function(lambda n: n.nothing), "failed on .*AttributeError"),
        (lambda q: q.set_global(3),
            ("3 is not a configuration: give a QuantizationConfig, a recipe "
            "such as 'w8a8', or None")),
        (lambda q: q.set_edge("linear", "linear_1", None),
            r"there is no edge \(linear -> linear_1\); 'linear_1' reads 'relu', 'blocks_0_down_weight'"),
        (lambda q: q.set_edge("x", "linaer", None), r"there is no edge .*; did you mean 'linear'"),
    ],
)  # fmt: skip
def test_mistakes(configure, message):
    with pytest.raises(AnnotationError, match=message):
        annotated(Stack(), ROWS, configure(XNNPACKQuantizer().set_global(FULL)))


# ------------------------------------------------------------ edges

MIN_MAX = QuantizationSpec(torch.int8, MinMaxObserver.with_args(), -128, 127, torch.per_tensor_affine)


def residual():
    return Of(lambda m, x: m.b(torch.relu(m.a(x))) + x, a=nn.Linear(8, 8), b=nn.Linear(8, 8))


@pytest.mark.parametrize("ends", [("inputs_0", "add"), (lambda n: n.op == "placeholder", lambda n: "add" in n.name)])
def test_an_edge_that_stays_float_leaves_its_op_float(ends):
    q = XNNPACKQuantizer().set_global(FULL).set_edge(*ends, None)
    gm = annotated(residual(), ROWS, q)
    (why,) = reasons(gm, q).values()
    assert why.startswith("rule 'add': edge (")
    assert why.endswith("is set to float")
    assert q.notes == []


def test_a_smaller_pattern_takes_over_where_an_edge_stays_float():
    config = get_default_x86_inductor_quantization_config(reduce_range=False)
    q = X86InductorQuantizer().set_global(config).set_edge("inputs_0", "add", None)
    model = Of(lambda m, x: m.c(x) + x, c=nn.Conv2d(3, 3, 1))
    gm = annotated(model, (torch.randn(1, 3, 4, 4),), q)
    named = {n.name: n for n in gm.graph.nodes}
    assert q.reason(named["conv2d"]) == "quantized by conv"
    assert "set to float" in q.reason(named["add"])


def test_an_edge_with_numbers_of_its_own():
    q = XNNPACKQuantizer().set_global(FULL).set_edge("relu", "linear_1", MIN_MAX).set_edge("inputs_0", "add", LOW)
    gm = annotated(residual(), ROWS, q)
    named = {n.name: n for n in gm.graph.nodes}
    into = named["linear_1"].meta["quantization_annotation"].input_qspec_map
    assert into[named["relu"]] == MIN_MAX
    assert into[named["b_weight"]] == FULL.weight
    assert named["add"].meta["quantization_annotation"].input_qspec_map[named["inputs_0"]] == LOW.input_activation
    result = quantize(residual(), ROWS, q, [ROWS])
    assert torch.isfinite(result(*ROWS)).all()


def test_a_weight_is_an_edge_too():
    per_tensor = get_symmetric_quantization_config(is_per_channel=False)
    q = XNNPACKQuantizer().set_global(FULL).set_edge("b_weight", "linear_1", per_tensor)
    named = {n.name: n for n in annotated(residual(), ROWS, q).graph.nodes}
    into = named["linear_1"].meta["quantization_annotation"].input_qspec_map
    assert into[named["b_weight"]] == per_tensor.weight


def test_a_backend_refuses_numbers_for_an_edge_as_it_does_elsewhere():
    unsigned = QuantizationSpec(torch.uint8, MinMaxObserver.with_args(), 0, 255, torch.per_tensor_affine)
    q = XNNPACKQuantizer().set_global(FULL).set_edge("relu", "linear_1", unsigned)
    with pytest.raises(AnnotationError, match=r"torch.uint8; XNNPACK computes on torch.int8 only"):
        annotated(residual(), ROWS, q)


def test_an_edge_that_shares_its_numbers_with_another():
    model = Of(lambda m, x: torch.cat([m.a(x), m.b(x)]), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    q = XNNPACKQuantizer().set_global(FULL).set_edge("linear_1", "cat", MIN_MAX)
    with pytest.raises(AnnotationError, match=r"gives it the numbers of edge \(linear -> cat\).*set that edge"):
        annotated(model, ROWS, q)


def test_edges_that_have_no_effect_or_are_set_twice():
    q = XNNPACKQuantizer().set_module_name("a", FULL).set_edge("relu", "linear_1", MIN_MAX)
    q.set_edge(lambda n: n.name == "inputs_0", "linear", MIN_MAX).set_edge("inputs_0", "linear", LOW)
    annotated(residual(), ROWS, q)
    assert q.notes[0].endswith("both name 'inputs_0' -> 'linear'; the later, edge (inputs_0 -> linear), applies")
    assert q.notes[1:] == [
        "edge (relu -> linear_1) has no effect: no rule quantizes that operand of 'linear_1'",
    ]


def test_every_quantizer_has_every_setter():
    names = ["set_global", "set_module_name", "set_module_type", "set_operator_type", "set_object_type", "set_node",
             "set_edge", "set_filter_function", "set_module_name_qconfig", "set_module_type_qconfig",
             "set_function_type_qconfig", "get_global_quantization_config"]  # fmt: skip
    for quantizer in (XNNPACKQuantizer(), X86InductorQuantizer(), EmbeddingQuantizer()):
        assert [name for name in names if not callable(getattr(quantizer, name))] == []
