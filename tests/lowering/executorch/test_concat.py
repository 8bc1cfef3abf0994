"""A tensor that is concatenated with itself runs in the delegate."""

import pytest
import torch
from torch import nn

import lowering
from quant2e import quantize
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.quantizers.models import IMAGE, Of


@pytest.mark.slow
def test_one_tensor_twice_is_concatenated_in_the_delegate():
    torch.manual_seed(0)  # other weights may meet a tie, which float noise settles
    model = Of(
        lambda m, x: (lambda h: m.d(torch.cat([h, h, h], 1)))(m.c(x)), c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(12, 2, 1)
    )
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    report = lowering.to_executorch(quantize(model.eval(), IMAGE, quantizer, [IMAGE])).report
    assert (len(report.partitions), report.leftovers, report.rewrites["distinct_operands"]) == (1, (), 2)
    assert report.verification.max_steps == 0


def test_a_concatenation_of_one_tensor_is_that_tensor():
    torch.manual_seed(0)
    model = Of(lambda m, x: m.d(torch.cat([m.c(x)], 1)), c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(4, 2, 1))
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    quantized = quantize(model.eval(), IMAGE, quantizer, [IMAGE])
    report = lowering.to_executorch(quantized).report
    assert (len(report.partitions), report.leftovers, report.rewrites["lone_operands"]) == (1, (), 1)
    assert report.verification.max_steps == 0
    integers = quantize(model, IMAGE, quantizer, [IMAGE], use_reference_representation=True)
    assert torch.equal(integers(*IMAGE), quantized(*IMAGE))
