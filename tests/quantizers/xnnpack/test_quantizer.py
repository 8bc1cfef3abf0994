"""What XNNPACKQuantizer annotates, as text, and what it leaves float and why."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant2e import AnnotationError, Quant2eError, quantize
from quant2e.annotation.specs import ANNOTATION
from quant2e.graph.attributes import attribute
from quantizers import QuantizationConfig, XNNPACKQuantizer, get_symmetric_quantization_config
from tests.quantizers.models import IMAGE, ROWS, TOKENS, Attention, Of, Residual, annotated, annotations, reasons

config = get_symmetric_quantization_config


def static(**kwargs):
    return XNNPACKQuantizer().set_global(config(is_per_channel=True, **kwargs))


def dynamic():
    return XNNPACKQuantizer().set_global(config(is_per_channel=True, is_dynamic=True))


def lines(model, example, quantizer=None) -> list[str]:
    """Annotations in short: ``a`` is an activation's spec, ``w`` a weight's."""
    text = annotations(model, example, quantizer or static())
    for spec, short in (
        ("s8[-128,127] dynamic", "d"),
        ("s8[-128,127]", "a"),
        ("s8[-127,127] symmetric axis ", "w"),
        ("s8[-127,127] symmetric", "w"),
    ):
        text = text.replace(spec, short)
    # every bias is on the grid of its accumulator: test_a_bias_is_on_the_grid_of_its_accumulator
    return re.sub(r", \w+ f32 derived", "", text).splitlines()


def test_a_small_cnn():
    assert lines(Residual(), IMAGE) == [
        "conv2d: x a, conv_weight w0  [conv]",
        "relu_: -> a  [conv]",
        "conv2d_1: relu_ a, depthwise_weight w0  [conv]",
        "relu6: -> a  [conv]",
        "conv2d_2: relu6 a, point_weight w0 -> a  [conv]",
        "add_: conv2d_2 a, relu_ a  [add]",
        "relu__1: -> a  [add]",
        "max_pool2d: relu__1 = relu__1 -> = relu__1>max_pool2d  [max_pool2d]",
        "adaptive_avg_pool2d: max_pool2d = max_pool2d -> a  [mean]",
        "flatten: adaptive_avg_pool2d = adaptive_avg_pool2d -> = adaptive_avg_pool2d>flatten  [moves]",
        "linear: flatten a, head_weight w0 -> a  [linear]",
    ]


def test_attention_with_a_mask():
    model, quantizer = Attention(), static()
    gm = annotated(model, TOKENS, quantizer)
    mask = "mask or position arithmetic, computed from integer and boolean inputs only"
    nothing = "rule 'moves': its input is not quantized, so there is nothing to continue"
    assert reasons(gm, quantizer) == {
        "to": mask,
        "rsub": mask,
        "mul": mask,
        "matmul": "XNNPACK computes it in float",
        "mul_1": "it stands between ops that XNNPACK computes in float",
        "add": f"rule 'add': operand 'y' ('mul') is {mask}",
        "softmax": "XNNPACK computes it in float",
        "matmul_1": "XNNPACK computes it in float",
        "transpose_4": nothing,
        "reshape": nothing,
        "layer_norm": "XNNPACK computes it in float",
    }
    assert lines(model, TOKENS)[:3] == [
        "linear: x a, q_weight w0 -> a  [linear]",
        "view: linear = linear -> = linear>view  [moves]",
        "transpose: view = view -> = view>transpose  [moves]",
    ]


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_bias_is_on_the_grid_of_its_accumulator(per_channel):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2)).eval()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=per_channel))
    result = quantize(model, IMAGE, quantizer, [IMAGE])
    on_grid = [group for group in result.encodings.groups if group.encoding == "on_grid"]
    assert len(on_grid) == 2
    graph = result.module
    for node in graph.graph.nodes:
        if node.target not in (torch.ops.aten.conv2d.default, torch.ops.aten.conv_transpose2d.input):
            continue
        x, w, b = node.args[:3]
        scale_w = w.args[1] if isinstance(w.args[1], float) else attribute(graph, w.args[1].target)
        steps = attribute(graph, b.target).double() / (torch.tensor(x.args[1]) * torch.as_tensor(scale_w)).double()
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        original = model[0 if node.target is torch.ops.aten.conv2d.default else 2].bias
        assert (attribute(graph, b.target) - original).abs().max() <= (x.args[1] * torch.as_tensor(scale_w)).max()


CONV = nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize(
    ("model", "example", "expected"),
    [
        (nn.Conv1d(3, 4, 3), (torch.randn(1, 3, 9),), ["conv1d: input_1 a, weight w0 -> a  [conv]"]),
        (nn.Conv2d(3, 4, 3, padding="same"), IMAGE, ["conv2d: input_1 a, weight w0 -> a  [conv]"]),
        (nn.Conv3d(3, 4, 3), (torch.randn(1, 3, 5, 5, 5),), []),
        (nn.Conv2d(3, 4, 3), (torch.randn(3, 8, 8),), [  # a single image becomes a batch
            "unsqueeze_default: input_1 a -> = input_1>unsqueeze_default  [moves]",
            "conv2d: unsqueeze_default a, weight w0 -> a  [conv]",
            "squeeze_dim: conv2d = conv2d -> = conv2d>squeeze_dim  [moves]",
        ]),
        (nn.ConvTranspose2d(3, 4, 2), IMAGE, ["conv_transpose2d: input_1 a, weight w1 -> a  [conv_transpose2d]"]),
        (nn.ConvTranspose2d(4, 4, 2, groups=2), (torch.randn(1, 4, 5, 5),), []),
        (nn.ConvTranspose1d(3, 4, 2), (torch.randn(1, 3, 9),), []),
        (nn.Linear(8, 4), (torch.randn(2, 3, 5, 8),), ["linear: input_1 a, weight w0 -> a  [linear]"]),
        (nn.Linear(8, 4), (torch.randn(8),), ["linear: input_1 a, weight w0 -> a  [linear]"]),
        *(
            (nn.Sequential(nn.Linear(8, 4), act), ROWS,
                ["linear: input_1 a, _0_weight w0  [linear]", f"{name}: -> a  [linear]"])
            for act, name in ((nn.ReLU(), "relu"), (nn.ReLU(inplace=True), "relu_"), (nn.ReLU6(), "hardtanh"),
                              (nn.Hardtanh(-2, 2), "hardtanh"), (nn.Hardtanh(inplace=True), "hardtanh_"))
        ),
        # of the clamps the delegate fuses relu and hardtanh, which is what a clamp on both sides is
        *(
            (
                Of(lambda m, x, f=function: f(m.linear(x)), linear=nn.Linear(8, 4)),
                ROWS,
                ["linear: inputs_0 a, linear_weight w0  [linear]", f"{name}: -> a  [linear]"],
            )
            for function, name in (
                (lambda y: y.clamp(-1, 1), "clamp"), (lambda y: y.clamp(max=6.0, min=0), "clamp"),
                    (lambda y: y.clamp(min=0), "clamp"),
                (lambda y: y.clamp_(-1, 1), "clamp_"), (lambda y: y.clamp_min(0), "clamp_min"),
                    (lambda y: y.clip(0, 2), "clip"),
                (lambda y: F.relu6(y, inplace=True), "relu6_"), (F.hardtanh_, "hardtanh_"),
                    (lambda y: y.relu_(), "relu_"),
            )
        ),
        # a clamp on one side is an op of its own, in the same numbers
        *(
            (
                Of(lambda m, x, f=function: f(m.linear(x)), linear=nn.Linear(8, 4)),
                ROWS,
                ["linear: inputs_0 a, linear_weight w0 -> a  [linear]",
                    f"{name}: linear = linear -> = linear>{name}  [clamp]"],
            )
            for function, name in (
                (lambda y: y.clamp(max=1), "clamp"), (lambda y: y.clamp_min(-1), "clamp_min"),
                    (lambda y: y.clamp_max(1), "clamp_max")
            )
        ),
        (Of(lambda m, x: x + x), ROWS, ["add: inputs_0 a -> a  [add]"]),
        (Of(lambda m, x: x - x.flip(0)), ROWS, ["flip: inputs_0 a -> = inputs_0>flip  [moves]",
            "sub: inputs_0 a, flip a -> a  [sub]"]),
        (Of(lambda m, x: torch.sub(x, x.flip(0), alpha=2)), ROWS, []),
        # a clamp behind a sum, difference or product is its own, as behind one with a weight
        (Of(lambda m, x: F.relu(x * x)), ROWS, ["mul: inputs_0 a  [mul]", "relu: -> a  [mul]"]),
        (Of(lambda m, x: F.relu6(x - x)), ROWS, ["sub: inputs_0 a  [sub]", "relu6: -> a  [sub]"]),
        (Of(lambda m, x: F.hardtanh(x + x)), ROWS, ["add: inputs_0 a  [add]", "hardtanh: -> a  [add]"]),
        (Of(lambda m, x: (1 - x).clamp(0, 0.5)), ROWS, [
            "rsub: rsub_number a, inputs_0 a  [sub]", "clamp: -> a  [sub]",
        ]),
        (Of(lambda m, x: (x * x).clamp(max=0.5)), ROWS, [
            "mul: inputs_0 a -> a  [mul]", "clamp: mul = mul -> = mul>clamp  [clamp]",
        ]),
        # numbers become tensors
        (Of(lambda m, x: x * 2), ROWS, ["mul: inputs_0 a, mul_number a -> a  [mul]"]),
        (Of(lambda m, x: 3 - x), ROWS, ["rsub: rsub_number a, inputs_0 a -> a  [sub]"]),
        (Of(lambda m, x: (x + 0.5) - 1), ROWS, [
            "add: inputs_0 a, add_number a -> a  [add]",
            "sub: add a, sub_number a -> a  [sub]",
        ]),
        (Of(lambda m, x: m.l(x).add_(3).mul_(2), l=nn.Linear(8, 4)), ROWS, [
            "linear: inputs_0 a, l_weight w0 -> a  [linear]",
            "add_: linear a, add__number a -> a  [add]",
            "mul_: add_ a, mul__number a -> a  [mul]",
        ]),
        (Of(lambda m, x: x * 3e38), ROWS, []),
        (Of(lambda m, x: F.relu(x)), ROWS, []),
        (Of(lambda m, x: torch.cat([x + x, x + x])), ROWS, [
            "add: inputs_0 a -> a  [add]",
            "add_1: inputs_0 a -> a  [add]",
            "cat: add = add, add_1 = add>cat -> = add>cat  [cat]",
        ]),
        (Of(lambda m, x: (lambda a: torch.cat([a, a]))(x + x)), ROWS, [
            "add: inputs_0 a -> a  [add]",
            "cat: add = add -> = add>cat  [cat]",
        ]),
        (Of(lambda m, x: m.c(x).mean([2, 3], keepdim=True), c=CONV), IMAGE, [
            "conv2d: inputs_0 a, c_weight w0 -> a  [conv]",
            "mean: conv2d = conv2d -> a  [mean]",
        ]),
        # zeros around an image are the convolution's; other paddings with zero move values
        (Of(lambda m, x: m.c(F.pad(x, (0, 1, 0, 1))), c=CONV), IMAGE, [
            "pad: inputs_0 a  [pad + conv]",
            "conv2d: c_weight w0 -> a  [pad + conv]",
        ]),
        (Of(lambda m, x: F.pad(m.c(x), (0, 0, 0, 0)), c=CONV), IMAGE, [
            "conv2d: inputs_0 a, c_weight w0 -> a  [conv]",
            "pad: conv2d = conv2d -> = conv2d>pad  [moves]",
        ]),
        (Of(lambda m, x: F.pad(m.c(x), (0, 1), value=1.0), c=CONV), IMAGE,
            ["conv2d: inputs_0 a, c_weight w0 -> a  [conv]"]),
        (Of(lambda m, x: F.pad(m.c(x), (1, 1, 1, 1), mode="reflect"), c=CONV), IMAGE, [
            "conv2d: inputs_0 a, c_weight w0 -> a  [conv]",
            "pad: conv2d = conv2d -> = conv2d>pad  [moves]",
        ]),
        (Of(lambda m, x: m.c(x).mean([2, 3]), c=CONV), IMAGE, [
            "conv2d: inputs_0 a, c_weight w0 -> a  [conv]",
            "mean: conv2d = conv2d -> a  [mean]",
        ]),
        # cat and mean also begin a quantized region, at an input
        (Of(lambda m, x: torch.cat([x, x])), ROWS, ["cat: inputs_0 a -> = inputs_0>cat  [cat]"]),
        (Of(lambda m, x: F.adaptive_avg_pool1d(x, 1)), TOKENS[:1], [
            "adaptive_avg_pool1d: inputs_0 a -> a  [mean]",
        ]),
        (Of(lambda m, x: F.max_pool1d(m.c(x), 3, 2), c=nn.Conv1d(4, 4, 1)), (torch.randn(2, 4, 8),), [
            "conv1d: inputs_0 a, c_weight w0 -> a  [conv]",
            "max_pool1d: conv1d = conv1d -> = conv1d>max_pool1d  [max_pool1d]",
        ]),
        (Of(lambda m, x: F.adaptive_avg_pool2d(x, 1)), IMAGE, ["adaptive_avg_pool2d: inputs_0 a -> a  [mean]"]),
        (Of(lambda m, x: torch.cat([x.exp(), x.exp()])), ROWS, []),
        (Of(lambda m, x: m.c(x).mean([1, 2]), c=CONV), IMAGE, ["conv2d: inputs_0 a, c_weight w0 -> a  [conv]"]),
        (Of(lambda m, x: F.avg_pool2d(m.c(x), 2), c=CONV), IMAGE, ["conv2d: inputs_0 a, c_weight w0 -> a  [conv]"]),
        (Of(lambda m, x: F.max_pool2d(m.c(x), 2, stride=3), c=CONV), IMAGE,
            ["conv2d: inputs_0 a, c_weight w0 -> a  [conv]"]),
        (Of(lambda m, x: F.adaptive_avg_pool2d(m.c(x), 2), c=CONV), IMAGE,
            ["conv2d: inputs_0 a, c_weight w0 -> a  [conv]"]),
        # a weight that is computed from parameters is a weight; one computed from data is not
        (Of(lambda m, x: F.linear(x, m.l.weight.t()), l=nn.Linear(8, 8)), ROWS,
            ["linear: inputs_0 a, t w0 -> a  [linear]"]),
        (Of(lambda m, x: F.linear(x, x)), ROWS, []),
        # shared weights and modules that are called twice
        (Of(lambda m, x: m.l(F.relu(m.l(x))), l=nn.Linear(8, 8)), ROWS, [
            "linear: inputs_0 a, l_weight w0  [linear]",
            "relu: -> a  [linear]",
            "linear_1: relu a, l_weight w0 -> a  [linear]",
        ]),
    ],
)  # fmt: skip
def test_ops(model, example, expected):
    assert lines(model, example) == expected


MOVES = [
    lambda x: x.view(4, 8), lambda x: x.reshape(-1), lambda x: x.flatten(), lambda x: x.permute(1, 0),
    lambda x: x.transpose(0, 1), lambda x: x.t(), lambda x: x.T, lambda x: x[1:], lambda x: x[0], lambda x: x[:, None],
    lambda x: x.unsqueeze(-1), lambda x: x[:1].squeeze(0), lambda x: x[:1].expand(3, 8), lambda x: x.t().contiguous(),
    lambda x: x.clone(), lambda x: F.dropout(x, 0.5, training=False), lambda x: x.to(torch.float32),
        lambda x: x.detach(),
    lambda x: x.repeat(2, 1), lambda x: x.unflatten(0, (2, 2)),
]  # fmt: skip


@pytest.mark.parametrize("move", MOVES)
def test_ops_that_move_values_continue_what_is_quantized(move):
    after = lines(Of(lambda m, x: move(m.l(x)), l=nn.Linear(8, 8)), ROWS)[1:]
    assert after
    assert all(line.endswith("[moves]") and " a" not in line for line in after)
    assert lines(Of(lambda m, x: move(x).exp()), ROWS) == []


def test_a_conversion_that_changes_the_dtype_moves_nothing():
    assert len(lines(Of(lambda m, x: m.l(x).to(torch.float64), l=nn.Linear(8, 8)), ROWS)) == 1


def test_dynamic():
    assert lines(Attention(), TOKENS, dynamic()) == [
        "linear: x d per token, q_weight w0  [dynamic linear]",
        "linear_1: x d per token, k_weight w0  [dynamic linear]",
        "linear_2: x d per token, v_weight w0  [dynamic linear]",
        "linear_3: reshape d per token, out_weight w0  [dynamic linear]",
    ]
    quantizer = dynamic()
    gm = annotated(Residual(), IMAGE, quantizer)
    why = reasons(gm, quantizer)
    assert why["conv2d_1"] == "rule 'dynamic conv2d': XNNPACK has no dynamic convolution of one channel per group"
    assert why["max_pool2d"] == "no dynamic rule covers aten.max_pool2d.default"


def test_dynamic_transposed_convolutions():
    turned = nn.ConvTranspose2d(3, 4, 3)
    assert lines(turned, IMAGE, dynamic()) == [
        "conv_transpose2d: input_1 d per image, weight w1  [dynamic conv_transpose2d]"
    ]
    grouped, single = nn.ConvTranspose2d(4, 4, 3, groups=2), nn.ConvTranspose2d(1, 4, 3)
    for layer, reason in (
        (grouped, "with groups=2 XNNPACK takes per-tensor weights only"),
        (single, "XNNPACK has no dynamic convolution of one channel per group"),
    ):
        quantizer, image = dynamic(), (torch.randn(1, layer.in_channels, 6, 6),)
        gm = annotated(layer, image, quantizer)
        assert reasons(gm, quantizer) == {"conv_transpose2d": f"rule 'dynamic conv_transpose2d': {reason}"}


def test_three_dimensions_stay_float_and_it_is_said_that_xnnpack_has_none():
    model = Of(
        lambda m, x: F.adaptive_avg_pool3d(F.avg_pool3d(F.max_pool3d(m.up(m.conv(x)), 2), 2), 1),
        conv=nn.Conv3d(1, 2, 3),
        up=nn.ConvTranspose3d(2, 2, 2),
    )
    quantizer = static()
    gm = annotated(model, (torch.randn(1, 1, 8, 8, 8),), quantizer)
    pools = dict.fromkeys(
        ("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d"), "XNNPACK pools in one and two dimensions only"
    )
    assert reasons(gm, quantizer) == pools | {
        "conv3d": "XNNPACK convolves in one and two dimensions only",
        "conv_transpose3d": "XNNPACK has transposed convolutions in two dimensions only",
    }


def test_dynamic_per_tensor_weights_are_widened_and_it_is_said():
    quantizer = XNNPACKQuantizer().set_global(config(is_dynamic=True))
    assert lines(nn.Linear(8, 4), ROWS, quantizer) == ["linear: input_1 d per token, weight w0  [dynamic linear]"]
    assert quantizer.notes == ["dynamic: weights are per channel, since XNNPACK takes no per-tensor weights there"]


def test_per_tensor_weights():
    quantizer = XNNPACKQuantizer().set_global(config())
    assert lines(nn.Linear(8, 4), ROWS, quantizer) == ["linear: input_1 a, weight w -> a  [linear]"]
    grouped = nn.ConvTranspose2d(4, 4, 2, groups=2)
    assert len(lines(grouped, (torch.randn(1, 4, 5, 5),), quantizer)) == 1


def test_masking_values_and_positions_stay_exact():
    table = nn.Embedding(10, 8)
    model = Of(
        lambda m, x: (x.masked_fill(x > 0, float("-inf")) + x, x + m.mask, torch.arange(8).float() * 0.5 + x),
        t=table,
    )
    model.register_buffer("mask", torch.full((4, 8), -1e9).triu(1))
    quantizer = static()
    gm = annotated(model, ROWS, quantizer)
    why = reasons(gm, quantizer)
    assert why["add"].endswith("is a tensor with the masking value that 'masked_fill' brings in")
    assert why["add_1"].endswith("is a tensor with the masking value that 'mask' brings in")
    assert why["mul"] == "a constant, computed from parameters and buffers"


def test_integers_are_never_annotated():
    index = (torch.randint(0, 8, (4, 8)),)
    model = Of(lambda m, i: (i * i + i).float() + (i + 1), l=nn.Linear(8, 8))
    assert lines(model, index) == []
    assert lines(Of(lambda m, x: x + x.argmax(-1, keepdim=True)), ROWS) == []


def test_float64_stays_float():
    quantizer = static()
    gm = annotated(nn.Linear(8, 4).double(), (torch.randn(2, 8).double(),), quantizer)
    why = "rule 'linear': the output of 'linear' is a float64 tensor, which is not quantized here: use model.float()"
    assert reasons(gm, quantizer) == {"linear": why}


def test_dynamic_shapes_are_annotated_alike():
    batch = torch.export.Dim("batch", min=2)
    shapes = ({0: batch},)
    assert annotations(Residual(), IMAGE, static(), dynamic_shapes=shapes) == annotations(Residual(), IMAGE, static())


def test_configs_are_values():
    assert config() is config()
    assert config(is_per_channel=True) == config(True)
    act = config(act_qmin=0, act_qmax=100).input_activation
    assert (act.dtype, act.quant_min, act.quant_max, act.is_dynamic) == (torch.int8, 0, 100, False)
    assert config(is_dynamic=True).output_activation is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: static().set_global(QuantizationConfig(None, None, config().weight, None)), "weight-only, for which"),
        (
            lambda: static().set_global(QuantizationConfig(_unsigned(), None, config().weight, None)),
            "input_activation has dtype torch.uint8; XNNPACK computes on torch.int8 only",
        ),
        (lambda: config(act_qmin=-300), "does not fit torch.int8"),
    ],
)
def test_what_the_delegate_cannot_run_is_refused(make, message):
    with pytest.raises((Quant2eError, AnnotationError), match=message):
        make()


def _unsigned():
    from quantizers import get_default_x86_inductor_quantization_config

    return get_default_x86_inductor_quantization_config().input_activation


def test_capabilities():
    able = XNNPACKQuantizer.quantization_capabilities()
    assert set(able) == {
        "pad + conv", "conv", "conv_transpose2d", "linear", "add", "sub", "mul", "cat", "max_pool2d", "max_pool1d",
        "mean", "clamp", "moves",
        "dynamic linear", "dynamic conv2d", "dynamic conv_transpose2d",
    }  # fmt: skip
    assert able["linear"] == ("hardtanh|relu|relu6(linear(x, w, b?))", "linear(x, w, b?)")


def test_moves_of_an_input_are_integers_where_a_kernel_reads_them():
    def moved(m, x):
        return (
            m.linear(x.permute(0, 2, 1).reshape(6, 12)),
            F.max_pool2d(x.unsqueeze(1), 2).flatten(1),
            x.permute(0, 2, 1),
        )

    quantizer = static()
    gm = annotated(Of(moved, linear=nn.Linear(12, 5)), (torch.randn(2, 12, 3),), quantizer)
    assert [n.name for n in gm.graph.nodes if ANNOTATION in n.meta] == ["permute", "reshape", "linear"]
    why = reasons(gm, quantizer)
    nothing = "its input is not quantized, so there is nothing to continue"
    assert why == {
        name: f"rule '{rule}': {nothing}"
        for name, rule in {
            "unsqueeze": "moves",
            "max_pool2d": "max_pool2d",
            "flatten": "moves",
            "permute_1": "moves",
        }.items()
    }
