"""What X86InductorQuantizer annotates, and what it refuses. For ranges see test_x86_policy and test_x86_range."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowering
from quant2e import AnnotationError, Quant2eError, quantize
from quant2e.annotation.specs import ANNOTATION
from quantizers import QuantizationConfig, X86InductorQuantizer
from quantizers import get_default_x86_inductor_quantization_config as config
from quantizers import get_x86_inductor_linear_dynamic_fp16_config as half
from tests.quantizers.models import IMAGE, ROWS, TOKENS, Attention, Of, Residual, annotated, annotations, reasons


def static(**kwargs):
    return X86InductorQuantizer().set_global(config(reduce_range=False, **kwargs))


def lines(model, example, quantizer=None) -> list[str]:
    """Annotations in short: ``a`` is an activation's spec, ``w`` a weight's."""
    text = annotations(model, example, quantizer or static())
    for spec, short in (("u8[0,255] dynamic", "d"), ("u8[0,255]", "a"), ("s8[-128,127] symmetric axis ", "w")):
        text = text.replace(spec, short)
    return text.splitlines()


def test_a_small_cnn():
    assert lines(Residual(), IMAGE) == [
        "conv2d: x a, conv_weight w0  [conv]",
        "relu_:  [conv]",
        "conv2d_1: relu_ a, depthwise_weight w0  [conv]",
        "relu6:  [conv]",
        "conv2d_2: relu6 a, point_weight w0  [conv + add]",
        "add_: relu_ a  [conv + add]",
        "relu__1:  [conv + add]",
        "max_pool2d: relu__1 a -> = relu__1>max_pool2d  [pool]",
        "adaptive_avg_pool2d: max_pool2d = max_pool2d -> = max_pool2d>adaptive_avg_pool2d  [pool]",
        "flatten: adaptive_avg_pool2d = adaptive_avg_pool2d -> = adaptive_avg_pool2d>flatten  [reshape]",
        "linear: flatten a, head_weight w0  [linear]",
    ]


def test_attention_with_a_mask():
    assert lines(Attention(), TOKENS) == [
        "linear: x a, q_weight w0  [linear]",
        "linear_1: x a, k_weight w0  [linear]",
        "linear_2: x a, v_weight w0  [linear]",
        "linear_3: reshape a, out_weight w0  [linear + add]",
        "add_1:  [linear + add]",
    ]
    quantizer = static()
    why = reasons(annotated(Attention(), TOKENS, quantizer), quantizer)
    assert why["view"] == "rule 'reshape': no int8 kernel reads it"
    assert why["softmax"] == "Inductor computes it in float, fused with its neighbours"
    assert why["matmul"].endswith("only where the op or its module is set, not by a global configuration")


def test_matmul_is_quantized_where_it_is_named():
    quantizer = static().set_function_type_qconfig(torch.matmul, config(reduce_range=False))
    assert lines(Attention(), TOKENS, quantizer)[3] == "matmul: transpose a, transpose_3 a  [matmul]"


class Lines(nn.Module):
    """A layer with an activation, another layer behind it, so that integers are wanted there."""

    def __init__(self, layer, act):
        super().__init__()
        self.first, self.act, self.second = copy.deepcopy(layer), act, copy.deepcopy(layer)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


LAYERS = {
    "conv1d": (nn.Conv1d(4, 4, 3, padding=1), (torch.randn(1, 4, 9),)),
    "conv2d": (nn.Conv2d(4, 4, 3, padding="same"), (torch.randn(1, 4, 9, 9),)),
    "conv3d": (nn.Conv3d(4, 4, 3, padding=1), (torch.randn(1, 4, 3, 4, 5),)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 4, 2, 2), (torch.randn(1, 4, 5, 5),)),
    "linear": (nn.Linear(8, 8), (torch.randn(2, 3, 8),)),
}
ACTS = {
    "relu": nn.ReLU(), "relu_": nn.ReLU(inplace=True), "relu6": nn.ReLU6(), "hardtanh": nn.Hardtanh(-1, 2),
    "clamp": Of(lambda m, x: x.clamp(0, 6)), "hardswish": nn.Hardswish(), "hardswish_": nn.Hardswish(inplace=True),
    "silu": nn.SiLU(), "gelu": nn.GELU(), "gelu, tanh": nn.GELU(approximate="tanh"), "leaky_relu": nn.LeakyReLU(0.1),
    "leaky_relu_": nn.LeakyReLU(0.1, inplace=True), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "elu": nn.ELU(),
    "clamp_min": Of(lambda m, x: x.clamp_min(0)),
}  # fmt: skip
RELUS = {"relu", "relu_"}
IMAGES = RELUS | {"relu6", "hardtanh", "clamp", "hardswish", "hardswish_", "silu"}
FUSED = {
    "conv1d": IMAGES,
    "conv2d": IMAGES,
    "conv3d": RELUS,
    "conv_transpose2d": IMAGES,
    "linear": IMAGES | {"gelu", "gelu, tanh", "leaky_relu", "leaky_relu_", "tanh"},
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_activations(layer, act):
    """Fused where a kernel takes them in; else float behind the kernel, with integers on neither side of them."""
    module, example = LAYERS[layer]
    quantizer = static()
    gm = annotated(Lines(module, ACTS[act]), example, quantizer)
    noted = {n.name: n.meta[ANNOTATION] for n in gm.graph.nodes if ANNOTATION in n.meta}
    kernels = [name for name in noted if name.startswith(layer)]
    assert len(kernels) == 2
    others = {name: note for name, note in noted.items() if name not in kernels}
    assert (len(others) == 1) is (act in FUSED[layer])
    assert all(not note.input_qspec_map and note.output_qspec is None for note in others.values())
    assert noted[kernels[0]].output_qspec is None
    if act not in FUSED[layer]:
        ((_, why),) = reasons(gm, quantizer).items()
        if layer == "conv3d":  # relu is what its quantization does
            return
        more = " and silu" if layer != "linear" else ", silu, gelu, leaky_relu and tanh"
        taken = f"relu, relu6, hardtanh, hardswish{more}"
        assert f"int8 kernel of '{kernels[0]}' returns" in why
        assert f"takes in {taken}, not " in why


C1, C2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
FIRST = ["conv2d: inputs_0 a, c1_weight w0  [conv]"]


@pytest.mark.parametrize(
    ("model", "example", "expected"),
    [
        (nn.Conv1d(3, 4, 3), (torch.randn(1, 3, 9),), ["conv1d: input_1 a, weight w0  [conv]"]),
        (nn.Conv2d(3, 4, 3, padding="same"), IMAGE, ["conv2d: input_1 a, weight w0  [conv]"]),
        (nn.Conv2d(3, 4, 2, padding="same"), IMAGE, ["conv2d: input_1 a, weight w0  [conv]"]),
        (nn.Conv3d(3, 4, 3), (torch.randn(1, 3, 5, 5, 5),), ["conv3d: input_1 a, weight w0  [conv]"]),
        *(
            (layer, (torch.randn(1, 3, *[5] * n),),
                [f"conv_transpose{n}d: input_1 a, weight w1  [transposed conv]"])
            for n, layer in ((1, nn.ConvTranspose1d(3, 4, 2)), (2, nn.ConvTranspose2d(3, 4, 2)),
                             (3, nn.ConvTranspose3d(3, 4, 2)))
        ),
        *(
            (nn.Sequential(nn.Conv2d(3, 4, 3), act), IMAGE,
                ["conv2d: input_1 a, _0_weight w0  [conv]", f"{name}:  [conv]"])
            for act, name in ((nn.ReLU(), "relu"), (nn.ReLU(inplace=True), "relu_"), (nn.ReLU6(), "hardtanh"),
                              (nn.Hardswish(), "hardswish"), (nn.SiLU(inplace=True), "silu_"))
        ),
        (nn.Sequential(nn.Linear(8, 4), nn.GELU()), ROWS,
            ["linear: input_1 a, _0_weight w0  [linear]", "gelu:  [linear]"]),
        (nn.Sequential(nn.Linear(8, 4), nn.Sigmoid()), ROWS, ["linear: input_1 a, _0_weight w0  [linear]"]),
        # one of two convolutions absorbs the sum; the other is its operand
        (Of(lambda m, x: F.relu(m.c1(x) + m.c2(x)), c1=C1, c2=C2), IMAGE, [
            "conv2d: inputs_0 a, c1_weight w0  [conv + add]",
            "conv2d_1: inputs_0 a, c2_weight w0  [conv]",
            "add: conv2d_1 a  [conv + add]",
            "relu:  [conv + add]",
        ]),
        # broadcasting, a convolution that is used again, and its own sum: no fusion
        (Of(lambda m, x: m.c1(x) + x.mean((2, 3), keepdim=True), c1=C1), IMAGE, FIRST),
        (Of(lambda m, x: (lambda c: (c + x, c))(m.c1(x)), c1=C1), IMAGE, FIRST),
        (Of(lambda m, x: (lambda c: c + c)(m.c1(x)), c1=C1), IMAGE, FIRST),
        (Of(lambda m, x: m.c1(x) + 1, c1=C1), IMAGE, FIRST),
        # cat, only of what is quantized
        (Of(lambda m, x: torch.cat([m.c1(x), m.c2(x)]), c1=C1, c2=C2), IMAGE, [
            "conv2d: inputs_0 a, c1_weight w0  [conv]",
            "conv2d_1: inputs_0 a, c2_weight w0  [conv]",
            "cat: conv2d a, conv2d_1 = conv2d>cat -> = conv2d>cat  [cat]",
        ]),
        (Of(lambda m, x: torch.cat([m.c1(x), x]), c1=C1), IMAGE, FIRST),
        (Of(lambda m, x: F.avg_pool2d(m.c1(x), 2), c1=C1), IMAGE, [
            *FIRST, "avg_pool2d: conv2d a -> = conv2d>avg_pool2d  [pool]",
        ]),
        *(
            (Of(lambda m, x, pool=pool: pool(m.c(x), 2), c=layer(3, 4, 3)), (torch.randn(1, 3, *[8] * n),), [
                f"conv{n}d: inputs_0 a, c_weight w0  [conv]",
                f"{pool.__name__}: conv{n}d a -> = conv{n}d>{pool.__name__}  [pool]",
            ])
            for n, layer, pools in (
                (1, nn.Conv1d, (torch.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d)),
                (3, nn.Conv3d, (torch.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d)),
            )
            for pool in pools
        ),
        (Of(lambda m, x: F.max_pool2d(x, 2)), IMAGE, []),
        (Of(lambda m, x: x * x), ROWS, []),
    ],
)  # fmt: skip
def test_ops(model, example, expected):
    assert lines(model, example) == expected


COMPILED = ("conv1d", "conv2d", "linear")


@pytest.mark.slow
@pytest.mark.inductor
def test_activations_are_fused_by_inductor_where_the_rules_say_so():
    """One program with every activation behind every layer: as many fusions as the table has."""
    torch.manual_seed(0)
    models = {
        f"{layer} {i}": Lines(LAYERS[layer][0], ACTS[act])
        for layer in COMPILED
        for i, act in enumerate(sorted(FUSED[layer]))
    }
    layers = [name.split()[0] for name in models]
    names = [f"m{i}" for i in range(len(models))]
    together = Of(
        lambda m, *inputs: [
            getattr(m, name)(inputs[COMPILED.index(layer)]) for name, layer in zip(names, layers, strict=True)
        ],
        **dict(zip(names, models.values(), strict=True)),
    ).eval()
    example = tuple(LAYERS[layer][1][0] for layer in COMPILED)
    program = lowering.to_inductor(quantize(together, example, static(), [example]), engines="onednn")
    assert program.report.leftovers == ()
    assert program.verification.sqnr_db > 50
    fused = Counter(op.target.split(".")[1] for op in program.report.ops if op.post_op)
    assert fused == {layer: len(FUSED[layer]) for layer in COMPILED}


def test_an_activation_is_not_fused_where_its_operand_is_used_again():
    quantizer = static()
    gm = annotated(Of(lambda m, x: (lambda y: F.gelu(y) + y)(m.l(x)), l=nn.Linear(8, 8)), ROWS, quantizer)
    assert reasons(gm, quantizer)["gelu"] == "Inductor computes it in float, fused with its neighbours"


def test_a_dropout_in_eval_mode_stands_before_an_addition():
    model = Of(lambda m, x: m.norm(m.d(m.l(x)) + x), l=nn.Linear(8, 8), d=nn.Dropout(0.1), norm=nn.LayerNorm(8))
    assert lines(model, ROWS) == [
        "linear: inputs_0 a, l_weight w0  [linear + add]",
        "dropout:  [linear + add]",
        "add:  [linear + add]",
    ]


def test_dynamic_products():
    quantizer = X86InductorQuantizer().set_global(config(is_dynamic=True, reduce_range=False))
    assert lines(Residual(), IMAGE, quantizer) == [
        "conv2d: x d, conv_weight w0  [dynamic conv]",
        "relu_:  [dynamic conv]",
        "conv2d_1: relu_ d, depthwise_weight w0  [dynamic conv]",
        "relu6:  [dynamic conv]",
        "conv2d_2: relu6 d, point_weight w0  [dynamic conv]",
        "linear: flatten d, head_weight w0  [dynamic linear]",
    ]
    quantizer = X86InductorQuantizer().set_global(config(is_dynamic=True, reduce_range=False))
    gm = annotated(Residual(), IMAGE, quantizer)
    assert reasons(gm, quantizer)["max_pool2d"] == "no dynamic rule covers aten.max_pool2d.default"


def test_configs_are_values():
    assert config(reduce_range=True) is config(reduce_range=True)
    assert config(reduce_range=True) != config(reduce_range=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: static().set_global("w8-tensor"), "must be torch.int8 per channel"),
        (lambda: static().set_global(QuantizationConfig(config().weight, None, config().weight, None)),
            "computes on torch.uint8"),
        (
            lambda: static().set_global(QuantizationConfig(config().input_activation, None, None, None)),
            "the weight must be torch.int8 per channel",
        ),
    ],
)  # fmt: skip
def test_what_inductor_does_not_lower_is_refused(make, message):
    with pytest.raises((Quant2eError, AnnotationError), match=message):
        make()


def test_weights_in_float16():
    quantizer = static().set_module_type(nn.Linear, half())
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False)).eval()
    result = quantize(model, ROWS, quantizer)
    names = [str(node.target).rpartition(".")[0] for node in result.module.graph.nodes if node.op == "call_function"]
    cast = "quantized_decomposed.convert_element_type"
    assert sorted(names) == ["aten.linear"] * 2 + ["aten.relu"] + [cast] * 4  # each weight to float16 and back
    rounded = copy.deepcopy(model)
    for parameter in (rounded[0].weight, rounded[2].weight):
        parameter.data = parameter.data.half().float()
    assert torch.equal(result(*ROWS), rounded(*ROWS))
    assert [verdict.kind for verdict in result.report.verdicts if verdict.quantized] == ["weight-only"] * 2


def test_what_scripts_read():
    quantizer = static()
    assert quantizer.get_global_quantization_config() is config(reduce_range=False)
    assert X86InductorQuantizer().get_global_quantization_config() is None
    gm = annotated(Residual(), IMAGE, quantizer)
    ends = [
        n.name for n in gm.graph.nodes if ANNOTATION in n.meta and n.meta[ANNOTATION]._is_output_of_quantized_pattern
    ]
    assert ends == ["relu_", "relu6", "relu__1", "max_pool2d", "adaptive_avg_pool2d", "flatten", "linear"]


@pytest.mark.parametrize(
    ("other", "asked", "quantized"),
    [((4, 8), True, True), ((8,), True, False), ((4, 8), False, False)],
)
def test_products_of_tensors_are_quantized_where_they_are_asked_for(other, asked, quantized):
    quantizer = static()
    if asked:
        quantizer.set_function_type_qconfig(torch.mul, config(reduce_range=False))
    gm = annotated(Of(lambda _, x, y: x * y), (torch.randn(4, 8), torch.randn(other)), quantizer)
    assert [n.name for n in gm.graph.nodes if ANNOTATION in n.meta] == ["mul"] * quantized
    if asked and not quantized:
        assert reasons(gm, quantizer) == {"mul": "rule 'mul': its operands are not two tensors of its own shape"}
