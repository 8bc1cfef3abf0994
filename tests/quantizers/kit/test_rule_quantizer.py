"""The kit: rules, what they refuse, and the reasons they give."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant2e import (
    AnnotationError,
    Arg,
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QuantizationSpec,
    capture,
    constant,
    convert_pt2e,
    op,
    prepare_pt2e,
)
from quant2e.annotation.pattern import Match
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation
from quant2e.report.record import RECORD_KEY
from quantizers import (
    Derived,
    Follow,
    Rule,
    RuleQuantizer,
    Same,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    annotations_text,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)
from tests.quantizers.models import IMAGE, ROWS, Of, annotated, annotations, captured, reasons

aten = torch.ops.aten
ACT = QuantizationSpec(torch.int8, HistogramObserver, -128, 127, torch.per_tensor_affine)
NARROW = QuantizationSpec(torch.int8, HistogramObserver, -8, 7, torch.per_tensor_affine)
WEIGHT = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, ch_axis=0)

x, y, w, b = Arg("x"), Arg("y"), constant("w"), constant("b", optional=True)
mac = op(aten.conv2d.default, aten.linear.default)(x, w, b)
add = op(aten.add.Tensor)
clamp = op(aten.relu.default, aten.hardtanh.default)
moves = op(aten.view.default, aten.permute.default, aten.max_pool2d.default)(x)


def product_scale(observers):
    (scale, _), (weight_scale, _) = (observer.calculate_qparams() for observer in observers)
    return scale * weight_scale, torch.zeros_like(weight_scale, dtype=torch.int64)


BIAS = Derived(("x", "w"), product_scale, torch.int32, -(2**31), 2**31 - 1, torch.per_channel_symmetric, ch_axis=0)


class Npu(RuleQuantizer):
    """A made-up accelerator: fused clamps and residual sums, int32 bias."""

    rules = (
        Rule(clamp(mac) | mac, {"x": ACT, "w": WEIGHT, "b": BIAS}, ACT, name="mac"),
        Rule(
            clamp(add([mac, y])) | add([mac, y]),
            {"x": ACT, "w": WEIGHT, "b": BIAS, "y": ACT},
            ACT,
            name="mac + add",
        ),
        Rule(clamp(add(x, y)) | add(x, y), {"x": ACT, "y": ACT}, ACT, name="add"),
        Rule(moves, {"x": Follow(ACT)}, Same("x"), name="moves"),
    )


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = F.relu(self.a(x) + x)
        x = F.max_pool2d(F.relu(self.b(x) + x), 2)
        return self.c(x) * 2


def short(text: str) -> list[str]:
    for spec, name in (
        ("s8[-128,127]", "a"),
        ("s8[-127,127] symmetric axis 0", "w"),
        ("s32[-2147483648,2147483647] symmetric axis 0 derived", "b"),
    ):
        text = text.replace(spec, name)
    return text.splitlines()


def test_the_larger_match_claims_its_nodes_whatever_the_order_of_the_table():
    assert short(annotations(Cnn(), IMAGE, Npu())) == [
        "conv2d: x a, a_weight w, a_bias b  [mac + add]",
        "add: x a  [mac + add]",
        "relu: -> a  [mac + add]",
        "conv2d_1: relu a, b_weight w, b_bias b  [mac + add]",
        "add_1: relu a  [mac + add]",
        "relu_1: -> a  [mac + add]",
        "max_pool2d: relu_1 = relu_1 -> = relu_1>max_pool2d  [moves]",
        "conv2d_2: max_pool2d a, c_weight w, c_bias b -> a  [mac]",
    ]


def test_reasons():
    quantizer = Npu()
    gm = annotated(Cnn(), IMAGE, quantizer)
    assert reasons(gm, quantizer) == {"mul": "no rule covers aten.mul.Tensor"}
    named = {n.name: n for n in gm.graph.nodes}
    assert quantizer.reason(named["relu"]) == "quantized by mac + add"
    assert quantizer.reason(named["x"]) == "not a float op"


@pytest.mark.parametrize(
    ("function", "name", "reason"),
    [
        (lambda m, i: F.linear(i, i), "linear",
            ("rule 'mac': operand 'w' of 'linear' is not constant: it depends on "
            "the input 'inputs_0'")),
        (lambda m, i: F.relu(i), "relu", "rule 'mac': 'inputs_0' is placeholder, not conv2d or linear"),
        (lambda m, i: i.permute(1, 0), "permute",
            ("rule 'moves': its input is not quantized, so there is "
            "nothing to continue")),
        (lambda m, i: i + torch.arange(8), "add", "rule 'add': operand 'y' is a int64 tensor"),
        (lambda m, i: i + 1, "add", "rule 'add': operand 'y' (operand 1) of 'add' is the literal 1, not a tensor"),
        (lambda m, i: i[:0] + i[:0], "add", "rule 'add': the output of 'add' is an empty tensor"),
        (lambda m, i: m.l.weight + m.l.weight, "add", "a constant, computed from parameters and buffers"),
        (lambda m, i: i + m.l.weight.sum(0).mul_(2), "mul_", "a constant, computed from parameters and buffers"),
        (lambda m, i: m.l.bias.detach().add_(1), "add_", "not constant: it changes a buffer"),
        (lambda m, i: F.linear(i, F.dropout(m.l.weight, training=False)), "dropout",
            "a constant, computed from parameters and buffers"),
        (lambda m, i: i.exp(), "exp", "no rule covers aten.exp.default"),
    ],
)  # fmt: skip
def test_reasons_of_single_ops(function, name, reason):
    quantizer = Npu()
    gm = annotated(Of(function, l=nn.Linear(8, 8)), ROWS, quantizer)
    assert reasons(gm, quantizer)[name] == reason


def quantizer_of(*rules):
    class Some(RuleQuantizer):
        pass

    Some.rules = rules
    return Some()


def test_same_may_refer_forward_and_to_the_result():
    pair = add(x, y)
    flip = Of(lambda m, i: i + i.flip(0))
    first = quantizer_of(Rule(pair, {"x": Same("y"), "y": ACT}, Same("x")))
    assert short(annotations(flip, ROWS, first)) == ["add: inputs_0 = flip>add, flip a -> = inputs_0>add  [add(x, y)]"]
    result = quantizer_of(Rule(pair, {"x": Same("result"), "y": Same("result")}, ACT))
    assert short(annotations(flip, ROWS, result)) == ["add: inputs_0 = add, flip = add -> a  [add(x, y)]"]
    # one tensor in both places has one set of numbers, and no share with itself
    twice = Of(lambda m, i: i + i)
    assert short(annotations(twice, ROWS, first)) == ["add: inputs_0 a -> = inputs_0>add  [add(x, y)]"]


def test_one_tensor_cannot_have_two_sets_of_numbers():
    quantizer = quantizer_of(Rule(add(x, y), {"x": ACT, "y": NARROW}, ACT, name="add"))
    gm = annotated(Of(lambda m, i: i + i), ROWS, quantizer)
    assert reasons(gm, quantizer) == {
        "add": "rule 'add': operands 'x' and 'y' are the same tensor and need different numbers"
    }


def test_a_list_of_tensors_has_one_set_of_numbers():
    quantizer = quantizer_of(Rule(op(aten.cat.default)(x), {"x": ACT}, Same("x"), name="cat"))
    model = Of(lambda m, i: torch.cat([i, i.flip(0), i]))
    assert short(annotations(model, ROWS, quantizer)) == [
        "cat: inputs_0 a, flip = inputs_0>cat -> = inputs_0>cat  [cat]"
    ]


def test_operands_of_none_and_optional_ones_stay_float():
    quantizer = quantizer_of(Rule(mac, {"x": ACT, "w": None, "b": ACT}, name="mac"))
    model = Of(lambda m, i: F.linear(i, m.l.weight), l=nn.Linear(8, 8))
    assert short(annotations(model, ROWS, quantizer)) == ["linear: inputs_0 a, l_weight float  [mac]"]


def test_when_looks_at_the_match():
    def wide(match: Match):
        return match.root.meta["val"].shape[-1] > 4 or "too narrow to pay"

    quantizer = quantizer_of(Rule(mac, {"x": ACT, "w": WEIGHT}, when=wide, name="mac"))
    gm = annotated(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)), ROWS, quantizer)
    assert reasons(gm, quantizer) == {"linear_1": "rule 'mac': too narrow to pay"}
    with pytest.raises(AnnotationError, match="the condition of rule 'mac' answers None for 'linear'"):
        annotated(nn.Linear(8, 4), ROWS, quantizer_of(Rule(mac, {"x": ACT}, when=lambda m: None, name="mac")))


def test_what_another_quantizer_annotated_is_left_alone():
    gm = captured(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), ROWS)
    linear = next(n for n in gm.graph.nodes if n.name == "linear")
    theirs = linear.meta[ANNOTATION] = QuantizationAnnotation()
    quantizer = Npu()
    quantizer.annotate(gm)
    assert linear.meta[ANNOTATION] is theirs
    assert reasons(gm, quantizer) == {
        "relu": "rule 'mac': 'linear' is already part of what another quantizer annotated"
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule(mac, {"weight": WEIGHT}), "names the operand 'weight', and its pattern .* has b, result, w, x"),
        (lambda: Rule(add(x, y), {"x": Same("yy")}), "did you mean 'y'"),
        (lambda: Rule(mac, {"b": Derived(("x", "v"), product_scale)}, name="mac"), "rule 'mac' names the operand 'v'"),
    ],
)
def test_rules_that_name_what_is_not_there(make, message):
    with pytest.raises(AnnotationError, match=message):
        make()


def test_annotating_is_deterministic_and_changes_nothing_but_annotations():
    before = captured(Cnn(), IMAGE)
    code = before.code
    texts = set()
    for _ in range(2):
        gm = captured(Cnn(), IMAGE)
        Npu().annotate(gm)
        texts.add(annotations_text(gm))
        assert gm.code == code
    assert len(texts) == 1


def told(text: str) -> list[str]:
    """Without the source lines."""
    return [re.sub(r" at \S+:\d+ `[^`]*`", "", line) for line in text.splitlines()]


def test_explain_says_which_rule_won_over_which():
    quantizer = Npu()
    gm = annotated(Cnn(), IMAGE, quantizer)
    named = {n.name: n for n in gm.graph.nodes}
    assert told(quantizer.explain(named["relu"])) == [
        "'relu' (aten.relu.default): quantized by mac + add",
        "  applied: rule 'mac + add' to conv2d, add, relu, which ends here",
        "  matched: rule 'add': rule 'mac + add' takes more ops",
        "  nearly matched: rule 'mac': 'add' is add, not conv2d or linear",
    ]
    assert told(quantizer.explain(named["conv2d"])) == [
        "'conv2d' (aten.conv2d.default) in module 'a': quantized by mac + add",
        "  applied: rule 'mac + add' to conv2d, add, relu, which ends in 'relu'",
        "  matched: rule 'mac': 'conv2d' is already part of rule 'mac + add', which takes conv2d, add, relu",
    ]
    assert told(quantizer.explain(named["mul"])) == ["'mul' (aten.mul.Tensor): no rule covers aten.mul.Tensor"]
    assert told(quantizer.explain(named["x"])) == ["'x' (placeholder): not a float op"]
    assert annotated(Cnn(), IMAGE, quantizer) is not gm
    prepared = prepare_pt2e(capture(Cnn().eval(), IMAGE), quantizer)  # the graph has observers now
    relu = next(n for n in prepared.graph.nodes if n.name == "relu")
    assert told(quantizer.explain(relu))[1:] == told(quantizer.explain(named["relu"]))[1:]


def test_explain_lists_every_rule_that_nearly_matched():
    quantizer = quantizer_of(
        Rule(clamp(mac), {"x": ACT, "w": WEIGHT}, ACT, name="clamped"),
        Rule(clamp(add(x, y)), {"x": ACT, "y": ACT}, ACT, name="clamped sum"),
        Rule(clamp(x), {"x": Follow(ACT)}, Same("x"), name="clamp"),
    )
    gm = annotated(Of(lambda m, i: F.relu(m.l(i).sigmoid()), l=nn.Linear(8, 8)), ROWS, quantizer)
    named = {n.name: n for n in gm.graph.nodes}
    assert told(quantizer.explain(named["relu"])) == [
        "'relu' (aten.relu.default): rule 'clamp': its input is not quantized, so there is nothing to continue",
        "  matched: rule 'clamp': its input is not quantized, so there is nothing to continue",
        "  nearly matched: rule 'clamped': 'sigmoid' is sigmoid, not conv2d or linear",
        "  nearly matched: rule 'clamped sum': 'sigmoid' is sigmoid, not add",
    ]
    assert told(quantizer.explain(named["linear"]))[1:] == [
        "  nearly matched: rule 'clamped': it covers linear only before hardtanh or relu, and here 'sigmoid' reads it"
    ]


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_bias_in_units_of_the_accumulator(per_channel):
    per_tensor = QuantizationSpec(torch.int8, MinMaxObserver, -127, 127, torch.per_tensor_symmetric)
    weight = WEIGHT if per_channel else per_tensor
    quantizer = quantizer_of(Rule(mac, {"x": ACT, "w": weight, "b": Derived.bias("x", "w")}, ACT))
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3, bias=False))
    prepared = prepare_pt2e(capture(model.eval(), ROWS), quantizer)
    prepared(*ROWS)
    converted = convert_pt2e(prepared)
    linear = next(n for n in converted.graph.nodes if n.name == "linear")
    activation, weights, bias = linear.args
    s_w = converted.get_buffer(weights.args[1].target) if per_channel else torch.tensor(weights.args[1])
    s_b = converted.get_buffer(bias.args[1].target) if per_channel else torch.tensor(bias.args[1])
    assert torch.equal(s_b, torch.tensor(activation.args[1]) * s_w)
    stored = converted.get_buffer(bias.args[0].target)
    assert stored.dtype == torch.int32
    assert torch.equal(stored, torch.round(model[0].bias.detach() * (1 / s_b)).int())


def test_capabilities_are_the_table():
    assert Npu.quantization_capabilities()["mac"] == (
        "hardtanh|relu(conv2d|linear(x, w, b?))",
        "conv2d|linear(x, w, b?)",
    )


class Odd(nn.Module):
    """Two linears: the weight of one went through idle dropout, that of the other is written through a view."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("state", torch.eye(8))

    def forward(self, x):
        y = F.linear(x, F.dropout(self.w, training=False))
        self.state[0].add_(1)
        return F.linear(y, self.state)


@pytest.mark.parametrize(
    "quantizer",
    [
        lambda: XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)),
        lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
        Npu,
    ],
    ids=["xnnpack", "x86", "npu"],
)
def test_the_report_and_the_rules_agree_on_what_is_constant(quantizer):
    example = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    prepared = prepare_pt2e(capture(Odd().eval(), example), quantizer())
    verdicts = {v.op.name: v for v in prepared.meta[RECORD_KEY].report.verdicts}
    assert (verdicts["dropout"].kind, verdicts["linear"].kind) == ("folded", "static")
    assert verdicts["select"].reason.startswith("not constant: it depends on 'add_' (aten.add_.Tensor)")
    assert verdicts["select"].reason.endswith(", which changes a buffer")
    assert verdicts["add_"].reason == "not constant: it changes a buffer"
    assert "operand 'w' of 'linear_1' is not constant: it depends on 'add_'" in verdicts["linear_1"].reason
    assert {verdicts[name].kind for name in ("select", "add_", "linear_1")} == {"float"}
    prepared(example)
    converted = convert_pt2e(prepared)
    assert [tuple(n.shape) for n in converted.buffers() if n.dtype is torch.int8] == [(8, 8)]
