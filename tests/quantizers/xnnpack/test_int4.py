"""Weights of 4 bits on XNNPACK: per channel and in groups, from configuration to runtime."""

import pytest
import torch
from torch import nn

import lowering
from quant2e import AnnotationError, capture, convert_pt2e, load, prepare_qat_pt2e, quantize
from quant2e.graph.attributes import attribute
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.quantizers.models import IMAGE, annotated, reasons

config = get_symmetric_quantization_config
PER_CHANNEL = config(is_per_channel=True, is_dynamic=True, weight_qmin=-8, weight_qmax=7)
IN_GROUPS = config(is_dynamic=True, group_size=32)
ROWS = (torch.randn(5, 64),)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 33, bias=False)).eval()


def set_to(configuration):
    return XNNPACKQuantizer().set_global(configuration)


@pytest.mark.parametrize(("configuration", "size"), [(PER_CHANNEL, None), (IN_GROUPS, 32)])
def test_the_program_computes_what_the_graph_says(configuration, size, tmp_path):
    result = quantize(model(), ROWS, set_to(configuration))
    result.save(tmp_path / "m.pt2")
    assert torch.equal(load(tmp_path / "m.pt2")(*ROWS), result(*ROWS))
    program = lowering.to_executorch(result)
    assert len(program.report.partitions) == 1
    assert program.report.leftovers == ()
    assert program.report.per_row is None
    assert program.report.verification.sqnr_db > 100
    weights = [n for n in result.module.graph.nodes if str(n.target).endswith("weight_quantized")]
    assert len(weights) == (2 if size is None else 1)  # 48 inputs are no multiple of 32
    first = attribute(result.module, str(weights[0].target))
    assert (first.dtype, int(first.min()), int(first.max())) == (torch.int8, -8, 7)


def test_scales_of_groups_are_what_xnnpack_stores():
    result = quantize(model(), ROWS, set_to(IN_GROUPS))
    (group,) = [g for g in result.encodings.groups if g.encoding == "per_group"]
    scales = torch.tensor(group.scale)
    assert torch.equal(scales, scales.bfloat16().float())
    assert (group.group_size, scales.numel(), set(group.zero_point)) == (32, 48 * 2, {0})
    weight = model()[0].weight.reshape(48, 2, 32)
    step = scales.reshape(48, 2, 1)
    stored = attribute(result.module, "0.weight_quantized").reshape(48, 2, 32)
    error = (stored * step - weight).abs() / step
    inside = (weight / step).round().clamp(-8, 7) == (weight / step).round()
    assert error[inside].max() <= 0.5 + 1e-4


def test_a_program_holds_two_weights_per_byte():
    sizes = {}
    for name, bounds in (("int8", {}), ("int4", {"weight_qmin": -8, "weight_qmax": 7})):
        wide = nn.Linear(512, 256, bias=False).eval()
        result = quantize(wide, (torch.randn(2, 512),), set_to(config(is_per_channel=True, is_dynamic=True, **bounds)))
        sizes[name] = len(lowering.to_executorch(result, verify=False).buffer)
    assert 60_000 < sizes["int8"] - sizes["int4"] <= 512 * 256 / 2


def test_what_4_bits_cannot_be_has_its_reason():
    quantizer = set_to(IN_GROUPS)
    assert reasons(annotated(nn.Sequential(nn.Linear(48, 4)), (torch.randn(2, 48),), quantizer), quantizer) == {
        "linear": "rule 'dynamic linear': its 48 inputs are no multiple of 32, as 4 bits need"
    }
    quantizer = set_to(PER_CHANNEL)
    assert reasons(annotated(nn.Conv2d(3, 4, 3), IMAGE, quantizer), quantizer) == {
        "conv2d": "XNNPACK has weights of 4 bits for linear only"
    }


@pytest.mark.parametrize("given", [config(is_dynamic=True, is_qat=True, group_size=32), "w4a8-dynamic-g32-qat"])
def test_groups_are_trained_in_as_they_are_stored(given):
    """What evaluation shows in training is what the converted graph computes, also after the weights have moved."""
    prepared = prepare_qat_pt2e(capture(model().train(), ROWS), set_to(given))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    before = prepared(*ROWS)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(*ROWS).square().sum().backward()
        optimizer.step()
    prepared.eval()
    trained = prepared(*ROWS)
    assert not torch.equal(trained, before)
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(*ROWS), trained)
    scale = attribute(converted, "0.weight_scale")
    assert (tuple(scale.shape), torch.equal(scale, scale.bfloat16().float())) == ((48, 2), True)


@pytest.mark.parametrize("recipe", ["w4a8-dynamic", "w4a8-dynamic-g32"])
def test_by_name(recipe):
    named, spelled = set_to(recipe), set_to(IN_GROUPS if recipe.endswith("g32") else PER_CHANNEL)
    assert named.configs() == spelled.configs()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"weight_qmin": -8, "weight_qmax": 7},
            "activations quantized at run time only: use is_dynamic=True, or weight_qmin=-7",
        ),
        (
            {"group_size": 32},
            "groups of 32: XNNPACK takes groups of a multiple of 32 .* activations quantized at run time",
        ),
        ({"group_size": 48, "is_dynamic": True}, "groups of 48: XNNPACK takes groups of a multiple of 32"),
        (
            {"group_size": 32, "is_dynamic": True, "weight_qmin": -127, "weight_qmax": 126},
            r"weights in \[-127, 126\] and groups",
        ),
    ],
)
def test_what_xnnpack_cannot_store_is_refused(arguments, message):
    with pytest.raises(AnnotationError, match=message):
        set_to(config(is_per_channel=True, **arguments))
