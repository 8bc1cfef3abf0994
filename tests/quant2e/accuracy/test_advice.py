"""Advice: what it says depends on what the error comes from."""

from __future__ import annotations

import torch
from torch import nn

import quant2e
from quant2e.accuracy.compare import compare
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config


def compared(model: nn.Module, data: list[torch.Tensor], **settings: bool) -> quant2e.Comparison:
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**settings))
    result = quant2e.quantize(model, (data[0],), quantizer, data, min_sqnr_db=None)
    return compare(model, result, data)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 16, generator=generator) for _ in range(5)]


def test_one_scale_for_a_weight_whose_channels_differ():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval()
    model[0].weight.data *= torch.logspace(0, -3, 16)[:, None]
    coarse = get_symmetric_quantization_config(weight_qmin=-7, weight_qmax=7)
    result = quant2e.quantize(model, (data()[0],), XNNPACKQuantizer().set_global(coarse), data(), min_sqnr_db=None)
    assert "give it one for each channel" in compare(model, result, data()).of("linear").advice


def test_a_weight_with_a_scale_for_each_channel_needs_more_bits():
    coarse = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True, weight_qmin=-8, weight_qmax=7)
    model = layers()
    result = quant2e.quantize(model, (data()[0],), XNNPACKQuantizer().set_global(coarse), min_sqnr_db=None)
    assert compare(model, result, data()).of("linear").advice == "its weight needs more bits, or the op stays float"


def test_an_input_with_an_outlier():
    batches = data()
    batches[0][0, 0] = 3000.0
    assert "own its range: look at the data" in compared(layers(), batches).of("input_1").advice


def test_what_makes_no_error_of_its_own_points_to_what_it_reads():
    model = nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1)).eval()
    assert compared(model, data()).of("softmax").advice.startswith("the error is that of what it reads")


def test_what_stays_float_has_no_advice():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    model[1].running_var.uniform_(0.5, 2.0)
    images = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config()).set_module_name("0", None)
    assert compare(model, quant2e.quantize(model, (images[0],), quantizer, images), images).of("conv2d").advice == ""


def test_a_weight_that_was_not_folded_is_a_weight():
    prepared = quant2e.prepare_pt2e(
        quant2e.capture(layers(), (data()[0],)),
        XNNPACKQuantizer().set_global(get_symmetric_quantization_config(weight_qmin=-3, weight_qmax=3)),
    )
    converted = quant2e.convert_pt2e(quant2e.calibrate(prepared, data()), fold_quantize=False)
    assert "give it one for each channel" in compare(layers(), converted, data()).of("linear_1").advice


def test_a_dynamic_op_is_not_told_to_be_dynamic():
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    model[0].weight.data[:, 0] = 0.0
    batches = data()
    for batch in batches:
        batch[:, 0] = 3000.0
    advice = compared(model, batches, is_dynamic=True, is_per_channel=True).of("linear").advice
    assert advice == "leave it float, or give activations more bits"
