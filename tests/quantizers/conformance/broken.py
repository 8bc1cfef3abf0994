"""A sound quantizer, and what authors get wrong: each of the others makes one realistic mistake."""

from dataclasses import dataclass

import torch

from quant2e import (
    Arg,
    FixedQParamsQuantizationSpec,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QuantizationAnnotation,
    QuantizationSpec,
    SharedQuantizationSpec,
    constant,
    op,
)
from quant2e.annotation.pattern import short_name
from quant2e.annotation.specs import ANNOTATION
from quantizers import Derived, Follow, Rule, RuleQuantizer, Same

aten = torch.ops.aten

ACT = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine)
NARROW = QuantizationSpec(torch.int8, MinMaxObserver, -100, 100, torch.per_tensor_affine)
WEIGHT = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, ch_axis=0)
ALONG_INPUTS = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, ch_axis=1)

x, y, w, b = Arg("x"), Arg("y"), constant("w"), constant("b", optional=True)
conv = op(aten.conv2d.default)(x, w, b)
linear = op(aten.linear.default)(x, w, b)
clamp = op(aten.relu.default)
add = op(aten.add.Tensor)(x, y)
moves = op(aten.max_pool2d.default)(x)

BIAS = Derived.bias("x", "w")
CONV = Rule(clamp(conv) | conv, {"x": ACT, "w": WEIGHT, "b": BIAS}, ACT, name="conv")
ADD = Rule(add, {"x": ACT, "y": ACT}, ACT, name="add")
MOVES = Rule(moves, {"x": Follow(ACT)}, Same("x"), name="moves")


class Sound(RuleQuantizer):
    rules = (CONV, ADD, MOVES)


def of(*rules):
    """A quantizer with these rules."""

    class Of(RuleQuantizer):
        pass

    Of.rules = rules
    return Of


def calls(model, *names):
    return [n for n in model.graph.nodes if n.op == "call_function" and short_name(n.target).removesuffix("_") in names]


def after(change):
    """A sound quantizer whose annotations, or whose graph, are then changed."""

    class After(Sound):
        def annotate(self, model):
            super().annotate(model)
            change(self, model)
            return model

    return After


def plainly(*names, spec=ACT):
    """Annotates every op of these names, all operands and the result, whatever they are."""

    class Plainly(Sound):
        def annotate(self, model):
            for node in calls(model, *names):
                if ANNOTATION not in node.meta:
                    operands = dict.fromkeys(node.all_input_nodes, spec)
                    node.meta[ANNOTATION] = QuantizationAnnotation(operands, spec, _annotated=True)
            return model

    return Plainly


@dataclass(frozen=True)
class LooseSpec:
    """A spec of another library: nothing in it is checked when it is made."""

    dtype: torch.dtype
    observer_or_fake_quant_ctr: object
    quant_min: int
    quant_max: int
    qscheme: torch.qscheme = torch.per_tensor_affine
    ch_axis: None = None
    is_dynamic: bool = False


def share_with_a_float(self, model):
    for node in calls(model, "conv2d"):
        note = node.meta.get(ANNOTATION)
        if note is not None and note.output_qspec is not None:
            note.output_qspec = SharedQuantizationSpec(node.args[0])


def share_in_a_circle(self, model):
    for node in calls(model, "add"):
        if (note := node.meta.get(ANNOTATION)) is not None:
            first = node.args[0]
            note.input_qspec_map[first] = SharedQuantizationSpec(node)
            note.output_qspec = SharedQuantizationSpec((first, node))


def clip_weights(self, model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.1, 0.1)


def start_from_nothing(self, model):
    for node in model.graph.nodes:
        node.meta.pop(ANNOTATION, None)
    Sound().annotate(model)


def by_address(self, model):
    annotated = {n for n in model.graph.nodes if getattr(n.meta.get(ANNOTATION), "output_qspec", None) is not None}
    if len(annotated) > 1:  # saves one requantization: of whichever the set hands out first
        next(iter(annotated)).meta[ANNOTATION].output_qspec = None


def remember_nodes(self, model):
    known = self.__dict__.setdefault("known", {})
    for node in calls(model, "conv2d"):
        if node.meta.get(ANNOTATION) is not None:
            node.meta[ANNOTATION] = known.setdefault(str(node.meta["val"].shape) + node.name, node.meta[ANNOTATION])


def spend_once(self, model):
    annotated = [node for node in model.graph.nodes if getattr(node.meta.get(ANNOTATION), "rule", "")]
    for node in annotated if self.__dict__.setdefault("used", False) else ():
        del node.meta[ANNOTATION]
    self.used |= bool(annotated)


def readers_disagree(self, model):
    for node in calls(model, "add"):
        note = node.meta.get(ANNOTATION)
        for source in note.input_qspec_map if note is not None else ():
            note.input_qspec_map[source] = NARROW


def only_images(self, model):
    for node in calls(model, "conv2d"):
        if node.meta["val"].shape[-1] % 2:
            raise NotImplementedError(f"special_input width {node.meta['val'].shape[-1]}")


def tidy_up(self, model):
    for node in calls(model, "relu"):
        node.target = aten.relu6.default


def beyond_the_relu(self, model):
    for node in calls(model, "relu"):
        source = node.args[0]
        note = node.meta.get(ANNOTATION)
        if note is not None and source.op == "call_function":
            note.input_qspec_map[source.args[0]] = ACT


def as_a_dict(self, model):
    for node in calls(model, "conv2d"):
        if node.meta.get(ANNOTATION) is not None:
            node.meta[ANNOTATION] = {"input": ACT, "output": ACT}


class ClampsLess(Sound):
    """Its transform is not the rewrite that it thinks it is."""

    def transform_for_annotation(self, model):
        for node in calls(model, "relu"):
            node.target = aten.relu6.default if node.target is aten.relu.default else node.target
            node.args = (node.args[0],)
            with model.graph.inserting_after(node):
                doubled = model.graph.call_function(aten.mul.Tensor, (node, 2.0))
            doubled.meta = {"val": node.meta["val"]}
            node.replace_all_uses_with(doubled, delete_user_cb=lambda user, doubled=doubled: user is not doubled)
        return model


def weight_scale_only(observers):
    _, weight = observers
    scale, zero_point = weight.calculate_qparams()
    return scale, zero_point


def dtype_of_its_own(**_options):
    return MinMaxObserver(dtype=torch.uint8)


WRONG_BIAS = Derived(
    ("x", "w"), weight_scale_only, torch.int32, -(2**31) + 128, 2**31 - 128, torch.per_channel_symmetric, ch_axis=0
)
SATURATED = FixedQParamsQuantizationSpec(torch.int8, 2.0**-10, 0, -128, 127, torch.per_tensor_affine)
IGNORES = QuantizationSpec(torch.int8, dtype_of_its_own, -128, 127, torch.per_tensor_affine)
REFUSES = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -128, 127, torch.per_tensor_affine)
PER_CHANNEL_ACT = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -128, 127, torch.per_channel_affine, ch_axis=1)
SWAPPED = LooseSpec(torch.int8, MinMaxObserver, 127, -128)
UNSIGNED_RANGE = LooseSpec(torch.int8, MinMaxObserver, 0, 255)
WITHOUT_ZERO = LooseSpec(torch.int8, MinMaxObserver, 1, 127)

# mistake → the quantizer, and the finding it must lead to: kind, rule, op, words of the message
BROKEN = {
    "dangling share": (after(share_with_a_float), "dangling share", "conv", "conv2d", "has no spec"),
    "cycle": (after(share_in_a_circle), "cyclic share", "add", "add", "(add) => "),
    "cycle in a rule": (of(Rule(add, {"x": Same("y"), "y": Same("x")}, ACT, name="pair")), "cyclic share", "pair",
        "add", " => "),
    "integer tensor": (plainly("add", "cat", "mul"), "integer tensor", "", "add", "int64"),
    "mask": (plainly("add", "mul", "rsub"), "mask", "", "mul", "mask"),
    "scales along inputs": (of(Rule(conv, {"x": ACT, "w": ALONG_INPUTS}, ACT, name="conv")), "wrong axis", "conv",
        "conv2d", "over which the op sums"),
    "scales of activations": (of(Rule(add, {"x": PER_CHANNEL_ACT, "y": ACT}, ACT, name="add")), "wrong axis", "add",
        "add", "is an activation"),
    "weight without activation": (of(Rule(conv, {"w": WEIGHT}, ACT, name="conv")), "isolated", "conv", "conv2d",
        "is float"),
    "activation without weight": (of(Rule(conv, {"x": ACT}, ACT, name="conv")), "isolated", "conv", "conv2d",
        "is float"),
    "some rules without activation": (of(CONV, Rule(clamp(linear), {"x": ACT, "w": WEIGHT}, ACT, name="linear + relu"),
        Rule(linear, {"w": WEIGHT}, name="linear")), "isolated", "linear", "linear", "its activation is not"),
    "moves alone": (of(Rule(moves, {"x": ACT}, Same("x"), name="moves")), "isolated", "moves", "max_pool2d",
        "no integer op is next to it"),
    "one scale across a sum": (of(CONV, Rule(add, {"x": ACT, "y": ACT}, Same("x"), name="add")), "shared across", "add",
        "add", "the scale of its operand"),
    "two scales around a move": (of(CONV, Rule(moves, {"x": Follow(ACT)}, ACT, name="moves")), "mismatched scales",
        "moves", "max_pool2d", "scales of their own"),
    "bias in units of the weight": (of(Rule(conv, {"x": ACT, "w": WEIGHT, "b": WRONG_BIAS}, ACT, name="conv")),
        "bias scale", "conv", "conv2d", "s_x * s_w"),
    "changes the parameters": (after(clip_weights), "model changed", "", "", "is not as it was"),
    "forgets others": (after(start_from_nothing), "annotation changed", "", None, "another had put on it"),
    "depends on addresses": (after(by_address), "not deterministic", "", None, "two runs on one graph"),
    "works once": (after(spend_once), "not deterministic", "", None, "two runs on one graph"),
    "observer of another dtype": (of(Rule(conv, {"x": IGNORES, "w": WEIGHT}, ACT, name="conv")), "observer", "conv",
        "conv2d", "dtype=torch.int8, and its observer has torch.uint8"),
    "observer for other schemes": (of(Rule(conv, {"x": REFUSES, "w": WEIGHT}, ACT, name="conv")), "observer", "conv",
        "conv2d", "cannot be made"),
    "shadowed rule": (of(Rule(conv, {"x": ACT, "w": WEIGHT}, ACT, name="first"),
        Rule(conv, {"x": NARROW, "w": WEIGHT}, NARROW, name="second")), "never reached", "second", "",
            "rule 'first' comes first"),
    "condition that nothing meets": (of(CONV, Rule(add, {"x": ACT, "y": ACT}, ACT, lambda match: "the adder is off",
        "add")), "never reached", "add", "", "the adder is off"),
    "bounds swapped": (of(Rule(conv, {"x": SWAPPED, "w": WEIGHT}, ACT, name="conv")), "bad range", "conv", "conv2d",
        "not below"),
    "range of another dtype": (of(Rule(conv, {"x": UNSIGNED_RANGE, "w": WEIGHT}, ACT, name="conv")), "bad range",
        "conv", "conv2d", "does not fit torch.int8"),
    "range without zero": (of(Rule(conv, {"x": WITHOUT_ZERO, "w": WEIGHT}, ACT, name="conv")), "bad range", "conv",
        "conv2d", "leaves out 0"),
    "nodes of another graph": (after(remember_nodes), "another graph", "conv", "conv2d", "another graph"),
    "overlapping patterns": (after(readers_disagree), "requantized", None, None, "with other numbers for 'add"),
    "raises on some shapes": (after(only_images), "raises", "", "", "NotImplementedError: special_input width"),
    "rewrites in annotate": (after(tidy_up), "graph changed", "", "", "relu6"),
    "transform with another result": (ClampsLess, "result changed", "", "", "float result"),
    "spec on what is not read": (after(beyond_the_relu), "not an operand", "conv", "relu", "does not read"),
    "annotation of another kind": (after(as_a_dict), "malformed annotation", "", "conv2d", "dict"),
    "a range that saturates": (of(Rule(conv, {"x": ACT, "w": WEIGHT}, SATURATED, name="conv")), "sqnr", "conv", None,
        "dB from float"),
}  # fmt: skip

__all__ = ["BROKEN", "Sound"]
