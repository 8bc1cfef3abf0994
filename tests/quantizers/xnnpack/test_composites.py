"""What XNNPACKQuantizer leaves float as a whole, and what it takes apart: composites, float tails, split tensors."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant2e import QuantizationAnnotation, Quantizer, capture, convert_pt2e, prepare_pt2e, quantize
from quant2e.annotation.specs import ANNOTATION
from quantizers import ComposableQuantizer, XNNPACKQuantizer, get_symmetric_quantization_config
from tests.quantizers.models import IMAGE, ROWS, Of, annotated, reasons

CONV = nn.Conv2d(3, 4, 3)
LINEAR = nn.Linear(8, 8)


def static(**kwargs):
    return XNNPACKQuantizer(**kwargs).set_global(get_symmetric_quantization_config(is_per_channel=True))


def rules(model, example, quantizer=None) -> dict[str, str]:
    """Op → the rule that quantizes it, or "float"."""
    quantizer = quantizer or static()
    gm = annotated(model, example, quantizer)
    floats = reasons(gm, quantizer)
    notes = {n.name: n.meta.get("quantization_annotation") for n in gm.graph.nodes if n.op == "call_function"}
    return {name: note.rule if note is not None else "float" for name, note in notes.items() if note or name in floats}


def norm(h, w):
    return w * ((h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True, unbiased=False) + 1e-5)) + w


COMPOSITES = {
    "silu": lambda h: h * torch.sigmoid(h),
    "hardswish": lambda h: h * F.relu6(h + 3) / 6,
    "hardswish, a factor in front": lambda h: (h * (1 / 6)) * F.relu6(h + 3),
    "hardswish without a division": lambda h: h * (F.relu6(h + 3) * (1 / 6)),
    "hardsigmoid": lambda h: F.relu6(h + 3) / 6,
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / 1.4142135)),
    "gelu by tanh": lambda h: 0.5 * h * (1 + torch.tanh(0.79788456 * (h + 0.044715 * torch.pow(h, 3)))),
    "mish": lambda h: h * torch.tanh(F.softplus(h)),
    "softmax": lambda h: (lambda e: e / e.sum(-1, keepdim=True))(torch.exp(h - h.amax(-1, keepdim=True))),
    "rms norm": lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6),
    "layer norm": lambda h: norm(h, torch.ones(8)),
    "twice a sigmoid, less one": lambda h: 2 * torch.sigmoid(h) - 1,
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_functions_that_a_model_spells_out_stay_whole(name):
    found = rules(Of(lambda m, x: m.b(COMPOSITES[name](m.a(x))), a=LINEAR, b=nn.Linear(8, 4)), ROWS)
    assert {op: rule for op, rule in found.items() if rule != "float"} == {"linear": "linear", "linear_1": "linear"}
    assert len(found) > 3


APART = {
    "a square": (lambda h: h * h, {"mul": "mul"}),
    "a residual": (lambda h: h + F.relu(h), {"relu": "clamp", "add": "add"}),
    "a clamp in front": (lambda h: (lambda r: r * torch.sigmoid(r))(F.relu(h)),
        {"relu": "linear", "sigmoid": "float", "mul": "float"}),
    "a gate from elsewhere": (lambda h: h * torch.sigmoid(LINEAR(h)),
        {"linear_1": "linear", "sigmoid": "float", "mul": "mul"}),
    "a sum with a number": (lambda h: F.relu(h + 3), {"add": "add", "relu": "add"}),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_is_no_composite_is_quantized(name):
    function, expected = APART[name]
    found = rules(Of(lambda m, x: m.b(function(m.a(x))), a=LINEAR, b=nn.Linear(8, 4), c=LINEAR), ROWS)
    last = "linear_2" if "linear_1" in expected else "linear_1"
    assert found == {"linear": "linear", **expected, last: "linear"}


def test_sums_between_float_ops_stay_float():
    quantizer = static()
    model = Of(lambda m, x: torch.softmax(torch.matmul(x, x.t()) * 0.5 + torch.matmul(x.t().t(), x.t()), -1))
    found = reasons(annotated(model, ROWS, quantizer), quantizer)
    assert (found["mul"], found["add"]) == (
        "it stands between ops that XNNPACK computes in float",
        "rule 'add': it stands between ops that XNNPACK computes in float",
    )
    assert rules(Of(lambda m, x: m.l(torch.matmul(x, x.t()).sum() + torch.exp(x)), l=LINEAR), ROWS)["add"] == "add"


class Detector(nn.Module):
    """A head with a box decoder: sigmoids, a grid, strides, anchors."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 1)
        grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1)
        self.register_buffer("grid", grid.view(1, 1, 8, 8, 2))
        self.register_buffer("anchors", torch.tensor([[30.0, 61.0], [62.0, 45.0]]).view(1, 2, 1, 1, 2))

    def forward(self, x):
        x = F.relu(self.backbone(x))
        y = self.head(x + 1).view(x.shape[0], 2, 5, 8, 8).permute(0, 1, 3, 4, 2)
        centre, size, score = y.split([2, 2, 1], -1)
        centre = (centre.sigmoid() * 2 - 0.5 + self.grid) * 32
        size = (size * 2) * self.anchors
        return torch.cat([centre, size, score], -1).view(x.shape[0], -1, 5)


def test_a_float_tail_begins_where_ranges_are_mixed():
    quantizer = static(float_tail=True)
    found = rules(Detector(), IMAGE, quantizer)
    assert {op: rule for op, rule in found.items() if rule != "float"} == {
        "conv2d": "conv", "relu": "conv", "add": "add", "conv2d_1": "conv", "view": "moves", "permute": "moves",
        "split_with_sizes": "moves", "getitem": "moves", "getitem_1": "moves", "getitem_2": "moves",
    }  # fmt: skip
    assert "mul_2" in rules(Detector(), IMAGE)
    assert rules(Detector(), IMAGE)["mul_2"] == "mul"
    result = quantize(Detector().eval(), IMAGE, quantizer, [IMAGE])
    assert result.report.of("mul_2").reason == "float tail: behind the last product, from 'mul_2' on"
    assert result.report.of("cat").reason.startswith("float tail")
    plain = quantize(Detector().eval(), IMAGE, static(), [IMAGE])
    assert result.report.sqnr_db > plain.report.sqnr_db + 3


def test_without_a_product_there_is_no_tail():
    assert rules(Of(lambda m, x: x * 2), ROWS, static(float_tail=True)) == {"mul": "mul"}


SPLITS = {
    "split": (lambda h: h.split(2, 1), "split"), "chunk": (lambda h: h.chunk(2, 1), "chunk"),
    "unbind": (lambda h: h.unbind(1), "unbind"), "sizes": (lambda h: h.split([1, 3], 1), "split_with_sizes"),
    "tensor_split": (lambda h: h.tensor_split(2, 1), "tensor_split"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_the_parts_of_a_split_tensor_share_its_scale(name):
    split, op = SPLITS[name]

    def parts(m, x):
        first, second = split(m.c(x))[:2]
        return first.flatten(1).mean() + second.flatten(1).mean() + F.relu(second)

    model = Of(parts, c=CONV)
    result = quantize(model.eval(), IMAGE, static(), [IMAGE])
    assert result.report.of(op).reason == "moves"
    groups = [
        group for group in result.encodings.groups if any(point in group.points for point in ("getitem", "getitem_1"))
    ]
    assert len(groups) == 1
    assert {"getitem", "getitem_1", "conv2d"} <= set(groups[0].points)


def test_shuffled_channels_keep_one_scale():
    def shuffle(m, x):
        a, b = m.c(x).chunk(2, 1)
        y = torch.cat([a, F.relu(b)], 1)
        return y.view(-1, 2, 2, 6, 6).transpose(1, 2).reshape(-1, 4, 6, 6)

    result = quantize(Of(shuffle, c=CONV).eval(), IMAGE, static(), [IMAGE])
    assert not [v.op.name for v in result.report.verdicts if v.kind == "float"]
    assert (
        len({g.scale for g in result.encodings.groups if g.encoding == "per_tensor"}) == 2
    )  # the input, and all the rest


def test_numeric_debuggers_find_the_tensor_of_an_op_in_every_form_of_it():
    gm = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), IMAGE)
    origins = {node.name: node.meta["from_node"] for node in gm.graph.nodes if node.op == "call_function"}
    prepared = prepare_pt2e(gm, static())

    def holding(module, name):
        nodes = [node for node in module.graph.nodes if node.op in ("call_function", "call_module")]
        return [n.name for n in nodes if n.meta.get("from_node") == origins[name]]

    assert holding(prepared, "conv2d") == ["conv2d"]  # what the relu rounds is observed behind it
    for name in ("relu", "conv2d_1"):
        node, observer = holding(prepared, name)
        assert node == name
        assert observer.startswith("activation_post_process_")
    prepared(*IMAGE)
    converted = convert_pt2e(prepared)
    for name in ("relu", "conv2d_1"):
        assert [n.rstrip("_0123456789") for n in holding(converted, name)] == [
            name.rstrip("_0123456789"), "quantize_per_tensor_default", "dequantize_per_tensor_default",
        ]  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_what_another_quantizer_said_of_a_part_is_kept(name):
    split, op = SPLITS[name]

    class OfParts(Quantizer):
        """Annotates what is picked from a split, and nothing else."""

        def annotate(self, model):
            for node in model.graph.nodes:
                if node.target is operator.getitem:
                    node.meta[ANNOTATION] = self.mine = QuantizationAnnotation(_annotated=True)
            return model

        def validate(self, model):
            pass

    gm = capture(Of(lambda m, x: split(m.c(x))[0] * 2, c=CONV).eval(), IMAGE)
    first = OfParts()
    ComposableQuantizer([first, static()]).annotate(gm)
    picked = [node for node in gm.graph.nodes if node.target is operator.getitem]
    assert first.mine in [node.meta[ANNOTATION] for node in picked]
    assert ANNOTATION not in next(n for n in gm.graph.nodes if n.name == op).meta


def test_four_bit_weights_are_for_linear_only_and_the_report_says_so():
    model = Of(lambda m, x: m.l(m.c(x).flatten(1)), c=CONV, l=nn.Linear(4 * 36, 4))
    four = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True, weight_qmin=-8, weight_qmax=7)
    report = quantize(model.eval(), IMAGE, XNNPACKQuantizer().set_global(four)).report
    assert report.of("conv2d").reason == "XNNPACK has weights of 4 bits for linear only"
    assert report.of("linear").reason == "dynamic linear"
