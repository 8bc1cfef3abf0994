"""Recurrent layers in the ExecuTorch runtime: whole in one delegate, and right over many steps."""

import pytest
import torch
from torch import nn

from lowering import to_executorch
from quant2e import quantize
from quantizers import XNNPACKQuantizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*_flat_weights:UserWarning")]

LAYERS = {
    "lstm, both directions": (nn.LSTM(6, 8, bidirectional=True), 6),
    "gru, batch first": (nn.GRU(6, 8, 2, batch_first=True), 6),
    "200 steps": (nn.RNN(6, 8), 200),
}


def sqnr_db(expected, found):
    return 10 * torch.log10(expected.square().sum() / (expected - found).square().sum()).item()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_one_delegate(name):
    torch.manual_seed(0)
    layer, steps = LAYERS[name]
    sizes = (3, steps, 6) if layer.batch_first else (steps, 3, 6)
    data = [(torch.randn(sizes),) for _ in range(3)]
    quantizer = XNNPACKQuantizer().set_global("w8a8-dynamic")
    quantized = quantize(layer.eval(), data[0], quantizer, calibration_data=data[:2])
    assert quantized.report.int8_mac_share == 1
    program = to_executorch(quantized)
    assert len(program.report.partitions) == 1
    with torch.no_grad():
        (expected, _), (found, _) = layer(*data[2]), program(*data[2])
    assert sqnr_db(expected, found) > 30
    # What one step rounds otherwise must not grow from step to step.
    half = steps // 2
    assert sqnr_db(*(x.movedim(1, 0)[half:] if layer.batch_first else x[half:] for x in (expected, found))) > 30
