"""What XNNPACK computes otherwise than a graph says, in notes."""

import pytest
import torch
from torch import nn

from lowering.executorch.xnnpack.limits import check_limits
from quant2e import capture, convert_pt2e, prepare_pt2e
from quantizers import XNNPACKQuantizer


@pytest.mark.parametrize(
    ("arguments", "batch", "note"),
    [
        ({"kernel_size": 3}, 3, ""),
        ({"kernel_size": 3}, 1, ""),
        ({"kernel_size": 1}, 3, "of this 1 × 1 convolution per pixel, the graph per image"),
        ({"kernel_size": 1}, 1, "of this 1 × 1 convolution per pixel, the graph per tensor"),
        ({"kernel_size": 1, "stride": 2}, 3, ""),
        ({"kernel_size": 1, "padding": 1}, 3, ""),
        ({"kernel_size": 1, "groups": 2}, 3, ""),
    ],
)
def test_scales_found_at_run_time(arguments, batch, note):
    x = torch.randn(batch, 4, 6, 6)
    quantizer = XNNPACKQuantizer().set_global("w8a8-dynamic")
    gm = convert_pt2e(prepare_pt2e(capture(nn.Sequential(nn.Conv2d(4, 6, **arguments)).eval(), (x,)), quantizer))
    notes = check_limits(gm)
    assert len(notes) == bool(note)
    assert all(note in each for each in notes)
