"""Softmax of images: XNNPACK's is along the last axis in memory, which is the channels behind a convolution."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from quant2e import capture, quantize
from quantizers import XNNPACKQuantizer

pytest.importorskip("executorch")

from lowering import to_executorch
from lowering.executorch.xnnpack.legalize.requirements import of_images
from tests.quantizers.models import Of

IMAGES = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(0))


class Behind(nn.Module):
    """A softmax behind ``layer`` and a relu."""

    def __init__(self, layer, dim):
        super().__init__()
        self.layer, self.dim = layer, dim

    def forward(self, x):
        return torch.softmax(torch.relu(self.layer(x)), self.dim)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 3, 3), nn.ConvTranspose2d(4, 3, 3), nn.MaxPool2d(2)], ids=repr)
@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_softmax_behind_an_image_op(layer, dim):
    program = to_executorch(capture(Behind(layer, dim).eval(), (IMAGES,)), (IMAGES,))
    assert len(program.report.partitions) == 1
    assert program.report.verification.sqnr_db > 100


@pytest.mark.parametrize("dim", [1, -1])
def test_quantized_with_a_batch_that_varies(dim):
    shapes = ({0: Dim("batch", min=1, max=16)},)
    layer = nn.Conv2d(4, 3, 3)
    quantizer = XNNPACKQuantizer().set_global("w8a8")
    result = quantize(Behind(layer, dim).eval(), (IMAGES,), quantizer, [(IMAGES,)], dynamic_shapes=shapes)
    program = to_executorch(result, (IMAGES,))
    assert len(program.report.partitions) == 1
    assert program.report.verification.passed
    assert program.report.verification.batches == 3


def test_of_several_sizes_that_vary_it_is_left_to_a_kernel():
    shapes = ({0: Dim("batch", min=1, max=4), 2: Dim("height", min=4, max=16)},)
    program = to_executorch(capture(Behind(nn.Conv2d(4, 3, 3), 1).eval(), (IMAGES,), dynamic_shapes=shapes), (IMAGES,))
    assert program.report.verification.sqnr_db > 100
    assert "channels of what it reads" in str(program.report)


def test_of_an_input_with_its_channels_last():
    x = IMAGES.contiguous(memory_format=torch.channels_last)
    program = to_executorch(capture(Of(lambda _, x: torch.softmax(x * 2, -1)), (x,)), (x,))
    assert program.report.verification.sqnr_db > 100


class Attends(nn.Module):
    """Attention of the results of a convolution, for all three of its inputs, or with ``other`` keys."""

    def __init__(self, *, other):
        super().__init__()
        self.layer, self.other = nn.Conv2d(4, 4, 3), other

    def forward(self, x):
        x = self.layer(x)
        return nn.functional.scaled_dot_product_attention(x, x + 1 if self.other else x, x)


@pytest.mark.parametrize("other", [True, False])
def test_each_reader_of_quantized_images_has_its_own_dequantize(other):
    result = quantize(Attends(other=other), (IMAGES,), XNNPACKQuantizer().set_global("w8a8"), [(IMAGES,)])
    program = to_executorch(result, (IMAGES,))
    assert program.report.verification.sqnr_db > 100
    assert program.report.rewrites["dequantized_by_reader"] == 1


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda _, x: torch.softmax(x, -1), False),
        (lambda _, x: torch.softmax(torch.nn.functional.avg_pool2d(x, 1) + 1, -1), True),
        (lambda _, x: torch.softmax(x + x.mean((2, 3), keepdim=True), -1), True),
        (lambda _, x: torch.softmax(torch.nn.functional.avg_pool2d(x, 1).view(2, 4, 9, 7), -1), False),
        (lambda _, x: torch.softmax(torch.nn.functional.avg_pool2d(x, 1).flatten(2), -1), False),
    ],
)
def test_what_may_have_its_channels_last(function, found):
    (node,) = capture(Of(function), (IMAGES,)).graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)
    assert of_images(node) is found
