"""What OpenVINOQuantizer annotates beside the rules of x86: the scores of attention."""

import pytest
import torch
import torch.nn.functional as F

from quantizers import OpenVINOQuantizer
from quantizers.conformance import check
from quantizers.x86.quantizer import get_default_x86_inductor_quantization_config
from tests.quantizers.models import TOKENS, Attention, Of, annotated, annotations, reasons

HEADS = (torch.linspace(-3, 3, 2 * 4 * 6 * 8).reshape(2, 4, 6, 8).sin(),)
LATER = torch.ones(6, 6, dtype=torch.bool).triu(1)
SCORES = "s8[-128,127] symmetric"


def static(isa="avx512_vnni"):
    return OpenVINOQuantizer(isa=isa).set_global("w8a8")


def lines(model, example, quantizer=None):
    return annotations(model, example, quantizer or static()).splitlines()


def test_scores_that_are_spelled_out():
    found = lines(Attention(), TOKENS)
    assert f"matmul: transpose {SCORES}, transpose_3 {SCORES}  [scores of attention, spelled out]" in found
    assert len(found) == 6  # the rules of x86 as they were, and neither the second product nor what is behind it


def test_scores_of_the_fused_op():
    model = Of(lambda m, x: F.scaled_dot_product_attention(x, x.sin(), x.cos()))
    assert lines(model, HEADS) == [
        f"scaled_dot_product_attention: inputs_0 {SCORES}, sin {SCORES}  [scores of attention]"
    ]


def test_a_product_that_no_softmax_reads_stays_as_x86_has_it():
    model = Of(lambda m, x: x @ x.sin().transpose(2, 3))
    quantizer = static()
    why = reasons(annotated(model, HEADS, quantizer), quantizer)
    assert lines(model, HEADS) == []
    assert "no softmax reads it" in why["matmul"] or "not by a global configuration" in why["matmul"]


@pytest.mark.parametrize(
    "between",
    [lambda x: x * 0.5, lambda x: x / 2, lambda x: x + 1, lambda x: x.masked_fill(LATER, -9.0), F.dropout],
    ids=["times", "over", "plus", "masked", "dropout"],
)
def test_what_scores_pass_before_their_softmax(between):
    def forward(module, x):
        scores = x @ x.sin().transpose(2, 3)
        scores = F.dropout(scores, 0.5, training=False) if between is F.dropout else between(scores)
        return scores.softmax(-1) @ x.cos()

    (line,) = lines(Of(forward), HEADS)
    assert line.startswith("matmul: ")


def test_queries_that_are_rounded_already_are_not_rounded_again():
    """A pool keeps the integers of its input."""
    model = Of(lambda m, x: F.scaled_dot_product_attention(m.pool(m.conv(x).relu()), x.sin(), x.cos()))
    model.conv, model.pool = torch.nn.Conv2d(4, 4, 1), torch.nn.AdaptiveAvgPool2d(6)
    x = (torch.linspace(-3, 3, 2 * 4 * 6 * 6).reshape(2, 4, 6, 6).sin(),)
    assert [line for line in lines(model, x) if "adaptive_avg_pool2d" in line]
    assert not any("scores" in line for line in lines(model, x))


IMAGE = (torch.linspace(-3, 3, 2 * 4 * 6 * 6).reshape(2, 4, 6, 6).sin(),)


class Squeezed(Of):
    """An image times a gate for each of its channels, as in squeeze and excitation."""

    def __init__(self, product=lambda image, gate: image * gate):
        def forward(m, x):
            image = m.conv(x).relu()
            return product(image, m.gate(F.adaptive_avg_pool2d(image, 1)).sigmoid())

        super().__init__(forward)
        self.conv, self.gate = torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 4, 1)


def explained(model, quantizer):
    """What the quantizer tried at the product, and why it left it float."""
    graph = annotated(model, IMAGE, quantizer).graph
    return quantizer.explain(next(node for node in graph.nodes if node.name == "mul"))


@pytest.mark.parametrize("product", [lambda image, gate: image * gate, lambda image, gate: gate * image])
@pytest.mark.parametrize("isa", ["avx512_vnni", "avx2"])
def test_an_image_that_is_scaled_is_read_as_the_integers_that_its_pool_reads(product, isa):
    found = lines(Squeezed(product), IMAGE, static(isa))
    (pool,) = (line for line in found if line.startswith("adaptive_avg_pool2d: "))
    (product_line,) = (line for line in found if line.startswith("mul: "))
    numbers = pool.removeprefix("adaptive_avg_pool2d: ").split(" -> ")[0]
    assert product_line == f"mul: {numbers}  [factor per channel]"


def test_an_image_whose_pool_computes_floats_stays_float():
    quantizer = static().set_operator_type(torch.nn.functional.adaptive_avg_pool2d, None)
    assert not any(line.startswith("mul: ") for line in lines(Squeezed(), IMAGE, quantizer))
    assert "nothing else reads 'relu' as integers" in explained(Squeezed(), quantizer)


def test_an_image_whose_other_reader_finds_its_scale_at_run_time_stays_float():
    def forward(module, x):
        image = module.conv(x).relu()
        return module.linear(image) + image * module.gate

    model = Of(forward)
    model.conv, model.linear, model.gate = torch.nn.Conv2d(4, 4, 1), torch.nn.Linear(6, 6), torch.ones(1, 4, 1, 1)
    dynamic = get_default_x86_inductor_quantization_config(is_dynamic=True)
    quantizer = static().set_operator_type(torch.nn.functional.linear, dynamic)
    assert not any(line.startswith("mul: ") for line in lines(model, IMAGE, quantizer))


@pytest.mark.parametrize(
    "product",
    [lambda image, gate: image * gate[:, :1], lambda image, gate: image * image.sin()],
    ids=["one for all channels", "one for each pixel"],
)
def test_other_factors_meet_floats(product):
    assert "is not one factor for each channel of 'relu'" in explained(Squeezed(product), static())


def test_without_vnni_scores_stay_float():
    found = lines(Attention(), TOKENS, static(isa="avx2"))
    assert not any("scores" in line for line in found)
    assert len(found) == 5


def test_scores_are_left_float_by_name():
    quantizer = static().set_operator_type(torch.matmul, None)
    assert not any("scores" in line for line in lines(Attention(), TOKENS, quantizer))


def test_dynamic_and_weight_only_have_no_scores():
    for given in ("w8a8-dynamic", "w8", "w4-g32"):
        quantizer = OpenVINOQuantizer().set_global(given)
        assert not any("scores" in line for line in lines(Attention(), TOKENS, quantizer))


def test_reasons_name_openvino():
    quantizer = static()
    why = reasons(annotated(Attention(), TOKENS, quantizer), quantizer)
    assert why["softmax"] == "OpenVINO computes it in float, fused with its neighbours"


@pytest.mark.slow
def test_it_conforms():
    report = check(static, examples=4, seconds=600)
    assert report.passed, str(report)
