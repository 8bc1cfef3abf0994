"""Recipes by name: what they parse to, and the configuration that each backend makes of them."""

import pytest
import torch
from torch import nn

from quant2e import AnnotationError, FusedMovingAvgObsFakeQuantize, PerAxis, PerGroup, PerTensor, quantize
from quant2e.accuracy.recipe.schemes import Numbers, Scheme
from quant2e.annotation.granularity import PerToken
from quant2e.observers.measuring import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from quantizers import (
    ConfigurableQuantizer,
    EmbeddingQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_embedding_quantization_config,
    get_symmetric_quantization_config,
    recipe,
)
from tests.quantizers.models import ROWS, annotations
from tests.quantizers.settings.test_module_names import Stack


def scheme(w, a=None, **others):
    return Scheme(weight=w, activation=a, **others)


W8, A8 = Numbers(bits=8), Numbers(bits=8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w8a8", scheme(W8, A8)),
        ("W8A8-static", scheme(W8, A8)),
        ("w8a8-dynamic", scheme(W8, A8, is_dynamic=True)),
        ("w8a8-qat", scheme(W8, A8, is_qat=True)),
        ("w8", scheme(W8)),
        ("w4-g32", scheme(Numbers(bits=4, granularity=PerGroup(32)))),
        ("w4a8-g64-dynamic", scheme(Numbers(bits=4, granularity=PerGroup(64)), A8, is_dynamic=True)),
        ("a16w8", scheme(W8, Numbers(bits=16))),
        ("w8a16", scheme(W8, Numbers(bits=16))),
        ("w8a8-tensor", scheme(Numbers(granularity=PerTensor()), A8)),
        ("w4-channel-asym", scheme(Numbers(bits=4, granularity=PerAxis(0), symmetric=False))),
    ],
)
def test_names(name, expected):
    assert recipe(name) == expected
    assert str(recipe(name)) == f"'{name}'"


def test_other_numbers():
    assert recipe("w4-g64", symmetric=True, eps=1e-6, observer=MinMaxObserver).weight == Numbers(
        bits=4, granularity=PerGroup(64), symmetric=True, eps=1e-6, observer=MinMaxObserver
    )
    varied = recipe("w8a8", activation={"range": (0, 127)}, weight={"bits": 6})
    assert (varied.activation, varied.weight) == (Numbers(range=(0, 127)), Numbers(bits=6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipe("int8"), "'int8' is not a recipe: a recipe is w<bits>"),
        (lambda: recipe("w8a8-fast"), "'fast' in recipe 'w8a8-fast' is no option"),
        (lambda: recipe("w4-g0"), "'g0' in recipe"),
        (lambda: recipe("w8-dynamic"), "leaves them float"),
        (lambda: recipe("w12"), "12 bits: integers here have 2 to 8 bits, or 16"),
        (lambda: recipe("w1"), "1 bits"),
        (lambda: recipe("w8", range=(-200, 200)), r"\[-200, 200\] does not fit 8 bits"),
        (lambda: recipe("w8a8", eps=1.0), "say whose numbers eps are"),
        (lambda: recipe("w8", activation={"bits": 8}), "leaves the activation float"),
        (lambda: recipe("w8", bitz=8), "bitz is none of the numbers of an operand: bits, symmetric"),
    ],
)
def test_what_is_no_recipe(make, message):
    with pytest.raises(AnnotationError, match=message):
        make()


class Npu(ConfigurableQuantizer):
    """A backend that runs whatever it is asked to, for its numbers."""

    def table(self, config):
        return ()


def of(quantizer, given):
    return quantizer.set_global(given).get_global_quantization_config()


def spec_of(given, quantizer=None):
    return of(quantizer or Npu(), given).weight


@pytest.mark.parametrize(
    ("quantizer", "name", "expected"),
    [
        (XNNPACKQuantizer, "w8a8", get_symmetric_quantization_config(is_per_channel=True)),
        (XNNPACKQuantizer, "w8a8-tensor", get_symmetric_quantization_config(is_per_channel=False)),
        (XNNPACKQuantizer, "w8a8-dynamic", get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)),
        (X86InductorQuantizer, "w8a8", get_default_x86_inductor_quantization_config()),
        (X86InductorQuantizer, "w8a8-dynamic", get_default_x86_inductor_quantization_config(is_dynamic=True)),
        (EmbeddingQuantizer, "w8", get_embedding_quantization_config()),
    ],
)
def test_a_name_means_what_the_backend_would_use_anyway(quantizer, name, expected):
    assert of(quantizer(), name) == expected


@pytest.mark.parametrize(
    ("given", "bounds", "scheme"),
    [
        ("w8", (-127, 127), torch.per_channel_symmetric),
        ("w8-asym", (-128, 127), torch.per_channel_affine),
        ("w4", (-8, 7), torch.per_channel_symmetric),
        ("w4-tensor", (-8, 7), torch.per_tensor_symmetric),
        (recipe("w8", range=(-64, 63)), (-64, 63), torch.per_channel_symmetric),
        (recipe("w8", granularity=PerAxis(1)), (-127, 127), torch.per_channel_symmetric),
    ],
)
def test_weights(given, bounds, scheme):
    spec = spec_of(given)
    assert (spec.dtype, (spec.quant_min, spec.quant_max), spec.qscheme) == (torch.int8, bounds, scheme)
    assert of(Npu(), given).input_activation is None
    assert spec.ch_axis == (
        1 if isinstance(given, Scheme) and given.weight.granularity else 0 if "channel" in str(scheme) else None
    )


@pytest.mark.parametrize(
    ("given", "scheme", "scale_dtype"),
    [
        ("w4-g32", torch.per_channel_affine, torch.bfloat16),
        ("w4-g32-sym", torch.per_channel_symmetric, torch.bfloat16),
        (recipe("w4-g32", scale_dtype=torch.float32), torch.per_channel_affine, torch.float32),
        ("w8-g32", torch.per_channel_symmetric, None),
    ],
)
def test_groups_of_few_bits_on_x86(given, scheme, scale_dtype):
    """They lose least with zero points, and lose nothing where scales are bfloat16."""
    spec = of(X86InductorQuantizer(), given).weight
    assert spec.qscheme == scheme
    assert spec.observer_or_fake_quant_ctr.p.keywords.get("scale_dtype") == scale_dtype


@pytest.mark.parametrize("given", ["w4a8-dynamic-g32", "w4a8-dynamic-g32-qat"])
def test_int8_rows_by_groups_of_4_bits_on_x86(given):
    """Each row has a scale of its own, as XNNPACK's have; the weight is that of 'w4-g32'."""
    config = of(X86InductorQuantizer(), given)
    rows = config.input_activation
    assert (rows.dtype, rows.quant_min, rows.quant_max, rows.is_dynamic) == (torch.int8, -128, 127, True)
    assert rows.observer_or_fake_quant_ctr.p.keywords["granularity"] == PerToken()
    assert config.output_activation is None
    if "qat" not in given:
        assert config.weight == of(X86InductorQuantizer(), "w4-g32").weight
    assert of(X86InductorQuantizer(), config) == config


def test_other_backends_keep_their_groups():
    """XNNPACK computes symmetric ones only."""
    assert of(XNNPACKQuantizer(), "w4a8-dynamic-g32").weight.qscheme == torch.per_channel_symmetric
    assert of(EmbeddingQuantizer(), "w4-g32").weight.qscheme == torch.per_channel_symmetric


def test_scales_in_the_graph_are_the_bfloat16_ones():
    torch.manual_seed(0)
    for given, rounded in (("w4-g32", True), (recipe("w4-g32", scale_dtype=torch.float32), False)):
        quantizer = X86InductorQuantizer().set_global(given)
        model = quantize(nn.Linear(64, 8).eval(), (torch.randn(1, 64),), quantizer)
        scale = model.module.get_buffer("weight_scale")
        assert scale.shape == (8, 2)
        assert torch.equal(scale, scale.bfloat16().float()) == rounded
        (group,) = (group for group in model.encodings.groups if group.scale)
        assert torch.equal(torch.tensor(group.scale), scale.flatten())


@pytest.mark.parametrize("name", ["w4", "w8-tensor"])
def test_scales_in_bfloat16_are_of_groups(name):
    with pytest.raises(AnnotationError, match="is for scales of groups"):
        recipe(name, scale_dtype=torch.bfloat16)
    with pytest.raises(AnnotationError, match="scales of groups are torch.float32 or bfloat16"):
        recipe(name, scale_dtype=torch.float16)


def test_activations():
    wide = of(Npu(), "a16w8").input_activation
    assert (wide.dtype, wide.quant_min, wide.quant_max) == (torch.int16, -32768, 32767)
    assert wide.qscheme == torch.per_tensor_symmetric
    low = of(
        Npu(), recipe("w8a4", activation={"symmetric": True, "observer": MinMaxObserver, "eps": 2.0})
    ).output_activation
    assert (low.dtype, low.quant_min, low.quant_max, low.qscheme) == (torch.int8, -8, 7, torch.per_tensor_symmetric)
    assert low.observer_or_fake_quant_ctr == MinMaxObserver.with_args(eps=2.0)
    assert of(X86InductorQuantizer(), recipe("w8a8", activation={"range": (0, 100)})).input_activation.quant_max == 100


def test_the_observer_and_the_smallest_scale_of_the_backend_stay():
    spec = spec_of("w8a8-tensor", XNNPACKQuantizer())
    assert spec.observer_or_fake_quant_ctr == MinMaxObserver.with_args(eps=2**-16)
    spec = spec_of(recipe("w8a8", weight={"observer": PerChannelMinMaxObserver}), XNNPACKQuantizer())
    assert spec.observer_or_fake_quant_ctr == PerChannelMinMaxObserver.with_args(eps=2**-16)
    spec = spec_of(recipe("w8", eps=1.0))
    assert spec.observer_or_fake_quant_ctr == PerChannelMinMaxObserver.with_args(eps=1.0)
    histogram = HistogramObserver.with_args(method="mse", eps=3.0)
    given = of(Npu(), recipe("w8a8", activation={"observer": histogram})).input_activation
    assert given.observer_or_fake_quant_ctr == histogram


@pytest.mark.parametrize(
    ("quantizer", "given", "message"),
    [
        (XNNPACKQuantizer, "w8", r"XNNPACKQuantizer does not run 'w8': .*weight-only.*It runs 'w8a8', 'w8a8-dynamic'"),
        (XNNPACKQuantizer, "a16w8", r"int16; XNNPACK computes on torch.int8 only.* It runs 'w8a8'"),
        (XNNPACKQuantizer, "w8a8-asym", "XNNPACK ignores zero points of weights"),
        (
            X86InductorQuantizer,
            "w4a8-g32",
            r"groups of 32.*Groups are for weight-only .*It runs 'w8a8', 'w8a8-dynamic', 'w8'",
        ),
        (X86InductorQuantizer, "w8a8-dynamic-g32", "in 4 bits for rows that are quantized at run time, 'w4a8-dynamic"),
        (X86InductorQuantizer, "w4a4-dynamic-g32", r"activations in \[0, 15\]: rows .* use all of their 8 bits"),
        (X86InductorQuantizer, "a16w8", r"torch.int16; this backend computes on torch.uint8.*It runs 'w8a8'"),
        (X86InductorQuantizer, "w8a8-tensor", "must be torch.int8 per channel"),
        (X86InductorQuantizer, recipe("w8a8", activation={"symmetric": True, "range": (0, 127)}), "zero point at 128"),
        (EmbeddingQuantizer, "w8a8", "quantizes weights only; leave the activations out. It runs 'w8'"),
        (EmbeddingQuantizer, "float", "'float' is not a recipe"),
    ],
)
def test_a_backend_says_what_to_use_instead(quantizer, given, message):
    with pytest.raises(AnnotationError, match=message):
        quantizer().set_global(given)


def test_configurations_for_training():
    assert of(XNNPACKQuantizer(), "w8a8-qat") == get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    assert spec_of("w8a8-qat-tensor", XNNPACKQuantizer()) == get_symmetric_quantization_config(is_qat=True).weight
    given = recipe("w8a8-qat", activation={"observer": MinMaxObserver})
    config = of(X86InductorQuantizer(), given)
    assert config.is_qat
    assert config.input_activation.observer_or_fake_quant_ctr == FusedMovingAvgObsFakeQuantize.with_args(
        observer=MinMaxObserver
    )
    with pytest.raises(
        AnnotationError, match="Npu has no configuration for quantization-aware training. It runs 'w8a8'"
    ):
        of(Npu(), "w8a8-qat")


def test_names_wherever_a_configuration_is_taken():
    q = (
        XNNPACKQuantizer()
        .set_global("w8a8")
        .set_module_name("head", "w8a8-dynamic")
        .set_module_type("Block", "w8a8-tensor")
    )
    q.set_node("linear", None).set_operator_type(torch.relu, "w8a8").set_edge(
        "relu_1", "linear_3", recipe("w8a8", activation={"range": (-100, 100)})
    )
    text = annotations(Stack(), ROWS, q).splitlines()
    assert "linear_1: relu = relu" in text[0] or "linear_1" in text[0]
    assert any(line.startswith("linear_3: relu_1 s8[-100,100]") for line in text)
    assert any(line.startswith("linear_4: linear_3 s8[-128,127] dynamic") for line in text)
    result = quantize(Stack(), ROWS, q, [ROWS])
    assert [v.kind for v in result.report.verdicts if v.op.name in ("linear", "linear_1", "linear_4")] == [
        "float",
        "static",
        "dynamic",
    ]


def test_a_model_from_one_word():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    by_name = quantize(model, ROWS, XNNPACKQuantizer().set_global("w8a8"), [ROWS])
    config = get_symmetric_quantization_config(is_per_channel=True)
    assert torch.equal(by_name(*ROWS), quantize(model, ROWS, XNNPACKQuantizer().set_global(config), [ROWS])(*ROWS))
