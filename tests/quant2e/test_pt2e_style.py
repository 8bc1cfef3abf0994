"""Quantizers written as the PT2E tutorials write them, with the names of `quant2e` in place of torchao's."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.fx import Node

import quant2e
from quant2e import (
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
    capture,
    convert_pt2e,
    prepare_pt2e,
)
from quant2e.observers import measuring as observer

aten, qd = torch.ops.aten, torch.ops.quantized_decomposed
ACT = QuantizationSpec(
    dtype=torch.uint8,
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
    is_dynamic=False,
    observer_or_fake_quant_ctr=observer.default_observer,
)
WEIGHT = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-128,
    quant_max=127,
    qscheme=torch.per_tensor_affine,
    is_dynamic=False,
    observer_or_fake_quant_ctr=observer.default_weight_observer,
)
BIAS = QuantizationSpec(dtype=torch.float32, is_dynamic=False, observer_or_fake_quant_ctr=observer.PlaceholderObserver)


class BackendAQuantizer(Quantizer):
    """Convolutions; what else is annotated, a subclass says."""

    def __init__(self, output=ACT):
        super().__init__()
        self.output = output

    def bias(self, node):
        return BIAS

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        for node in model.graph.nodes:
            if node.op == "call_function" and node.target == aten.conv2d.default:
                input_act, weight, bias = node.args[:3]
                assert all(isinstance(n, Node) for n in (input_act, weight, bias))
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map={input_act: ACT, weight: WEIGHT, bias: self.bias(node)},
                    output_qspec=self.output,
                    _annotated=True,
                )
            elif node.op == "call_function":
                self.other(node)

    def other(self, node):
        """What is not a convolution stays float."""

    def validate(self, model: torch.fx.GraphModule) -> None:
        pass


class ConvPoolConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.b(nn.functional.max_pool2d(self.a(x), 2)).sigmoid()


class CatOfConvs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x, y):
        return torch.cat([self.a(x), self.b(y)], dim=1)


IMAGE = torch.rand(1, 3, 8, 8)


def run(model, quantizer, *inputs):
    m = prepare_pt2e(capture(model.eval(), inputs), quantizer)
    m(*inputs)
    return convert_pt2e(m)


def occurrences(m):
    return Counter(node.target for node in m.graph.nodes if node.op == "call_function")


def test_simple_quantizer():
    model = ConvPoolConv()
    m = run(model, BackendAQuantizer(), IMAGE)
    found = occurrences(m)
    assert found[qd.quantize_per_tensor.default] == 4
    assert found[qd.dequantize_per_tensor.default] == 6
    assert torch.allclose(m(IMAGE), model(IMAGE), atol=0.02)
    assert {n for n, t in m.state_dict().items() if t.dtype == torch.float32} == {"a.bias", "b.bias"}


def test_an_output_that_is_not_annotated():
    found = occurrences(run(ConvPoolConv(), BackendAQuantizer(output=None), IMAGE))
    assert found[qd.quantize_per_tensor.default] == 2
    assert found[qd.dequantize_per_tensor.default] == 4


def test_shared_with_an_input_edge():
    class Pooled(BackendAQuantizer):
        def other(self, node):
            if node.target == aten.max_pool2d.default:
                input_act = node.args[0]
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map={input_act: ACT},
                    output_qspec=SharedQuantizationSpec((input_act, node)),
                    _annotated=True,
                )

    m = run(ConvPoolConv(), Pooled(), IMAGE)
    pool = next(n for n in m.graph.nodes if n.target == aten.max_pool2d.default)
    before, after = pool.args[0], next(iter(pool.users))
    assert before.args[1:] == after.args[1:]


@pytest.mark.parametrize("forward", [False, True])
def test_shared_between_the_operands_of_a_cat(forward):
    """Also when the shared operand comes before the one it refers to."""

    class Shared(BackendAQuantizer):
        def other(self, node):
            if node.target == aten.cat.default:
                first, second = node.args[0]
                own, other = (second, first) if forward else (first, second)
                shared: EdgeOrNode = (own, node)
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    {first: SharedQuantizationSpec(shared), second: ACT}
                    if forward
                    else {first: ACT, second: SharedQuantizationSpec(shared)},
                    SharedQuantizationSpec(shared),
                    _annotated=True,
                )
                assert other in node.args[0]

    m = prepare_pt2e(capture(CatOfConvs().eval(), (IMAGE, IMAGE * 2)), Shared())
    cat = next(n for n in m.graph.nodes if n.target == aten.cat.default)
    (left, right), (out,) = cat.args[0], cat.users
    shared = m.get_submodule(left.target)
    assert m.get_submodule(right.target) is shared
    assert m.get_submodule(out.target) is shared
    # Implicitly with the convolutions' outputs, which are the same tensors.
    assert left.args[0].target == aten.conv2d.default
    assert right.args[0].target == aten.conv2d.default
    m(IMAGE, IMAGE * 2)
    converted = convert_pt2e(m)
    cat = next(n for n in converted.graph.nodes if n.target == aten.cat.default)
    assert len({dq.args[1:] for dq in cat.args[0]}) == 1


def test_derived_bias():
    class Derived(BackendAQuantizer):
        def bias(self, node):
            def derive_qparams_fn(obs_or_fqs):
                act, weight = obs_or_fqs
                return act.calculate_qparams()[0] * weight.calculate_qparams()[0], torch.tensor([0], dtype=torch.int32)

            return DerivedQuantizationSpec(
                derived_from=[(node.args[0], node), (node.args[1], node)],
                derive_qparams_fn=derive_qparams_fn,
                dtype=torch.int32,
                quant_min=-(2**31),
                quant_max=2**31 - 1,
                qscheme=torch.per_tensor_symmetric,
            )

    m = run(ConvPoolConv(), Derived(), IMAGE)
    for conv in (n for n in m.graph.nodes if n.target == aten.conv2d.default):
        x, w, b = conv.args[:3]
        assert b.args[0].op == "get_attr"
        assert m.get_buffer(b.args[0].target).dtype == torch.int32
        assert b.args[1] == pytest.approx(x.args[1] * w.args[1], rel=1e-6)
        assert b.args[2:] == (0, -(2**31), 2**31 - 1, torch.int32)


def test_fixed_parameters_of_a_sigmoid():
    class Fixed(BackendAQuantizer):
        def other(self, node):
            if node.target == aten.sigmoid.default:
                fixed = FixedQParamsQuantizationSpec(
                    dtype=torch.uint8,
                    quant_min=0,
                    quant_max=255,
                    qscheme=torch.per_tensor_affine,
                    scale=1.0 / 256.0,
                    zero_point=0,
                )
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    {node.args[0]: ACT}, fixed, _annotated=True
                )

    m = run(ConvPoolConv(), Fixed(), IMAGE)
    sigmoid = next(n for n in m.graph.nodes if n.target == aten.sigmoid.default)
    (q,) = sigmoid.users
    assert q.target == qd.quantize_per_tensor.default
    assert q.args[1:] == (1.0 / 256.0, 0, 0, 255, torch.uint8)


def test_dynamic_per_tensor():
    class DynamicLinear(Quantizer):
        def annotate(self, model):
            for node in model.graph.nodes:
                if node.target == aten.linear.default:
                    act = QuantizationSpec(
                        dtype=torch.int8,
                        quant_min=-128,
                        quant_max=127,
                        qscheme=torch.per_tensor_affine,
                        is_dynamic=True,
                        observer_or_fake_quant_ctr=observer.PlaceholderObserver,
                    )
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        {node.args[0]: act, node.args[1]: WEIGHT}, _annotated=True
                    )
            return model

        def validate(self, model):
            pass

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    m = run(model, DynamicLinear(), x)
    found = occurrences(m)
    assert found[qd.choose_qparams.tensor] == found[qd.quantize_per_tensor.tensor] == 2
    assert torch.allclose(m(x * 5), model(x * 5), atol=0.2)


def test_a_quantizer_that_is_only_shaped_like_one():
    """No base class: the methods are enough."""

    class Plain:
        def annotate(self, model):
            BackendAQuantizer().annotate(model)

        def validate(self, model):
            pass

    assert occurrences(run(ConvPoolConv(), Plain(), IMAGE))[qd.quantize_per_tensor.default] == 4


def test_transform_for_annotation_may_rewrite_the_copy():
    class Decomposes(BackendAQuantizer):
        def transform_for_annotation(self, model):
            for node in list(model.graph.nodes):
                if node.target == aten.sigmoid.default:
                    with model.graph.inserting_before(node):
                        half = model.graph.call_function(aten.mul.Tensor, (node.args[0], 0.5))
                        tanh = model.graph.call_function(aten.tanh.default, (half,))
                        one = model.graph.call_function(aten.add.Tensor, (tanh, 1.0))
                        out = model.graph.call_function(aten.mul.Tensor, (one, 0.5))
                    node.replace_all_uses_with(out)
                    model.graph.erase_node(node)
            model.recompile()
            return model

    model = ConvPoolConv()
    captured = capture(model.eval(), IMAGE)
    m = prepare_pt2e(captured, Decomposes())
    m(IMAGE)
    m = convert_pt2e(m)
    assert aten.sigmoid.default not in occurrences(m)
    assert aten.sigmoid.default in occurrences(captured)
    assert torch.allclose(m(IMAGE), model(IMAGE), atol=0.02)


def test_train_and_eval_may_be_called_on_every_stage():
    captured = capture(ConvPoolConv().eval(), IMAGE)
    quant2e.move_exported_model_to_eval(captured)
    prepared = prepare_pt2e(captured, BackendAQuantizer())
    prepared.eval()(IMAGE)
    converted = convert_pt2e(prepared)
    assert torch.equal(converted.eval()(IMAGE), converted(IMAGE))
