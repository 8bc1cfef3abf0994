"""Transposed convolutions as plain ones: the same numbers, for every kind of size."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowering.inductor.kernels.engines import _interleaved
from lowering.inductor.kernels.transposed import TransposedConvolution, is_transposed

PLAIN = {1: F.conv2d, 2: F.conv2d, 3: F.conv3d}
LAYERS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def exported(layer, x):
    graph = torch.export.export(layer.eval(), (x,)).module().graph
    return next(node for node in graph.nodes if node.op == "call_function" and is_transposed(node))


def plain(sizes, weight, x):
    made = PLAIN[len(sizes.stride)](x, sizes.plain_weight(weight), None, *sizes.plain_shape)
    return sizes.interleave(made, lambda op, *args: op(*args))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_the_numbers_of_two_dimensions(kernel, stride, dilation, groups):
    generator = torch.Generator().manual_seed(kernel)
    weight = torch.randn(4, 3, kernel, kernel, dtype=torch.float64, generator=generator)
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64, generator=generator)
    for padding, more in itertools.product((0, 1, 2), range(min(max(stride, dilation), 3))):
        if 3 * stride - 2 * padding + dilation * (kernel - 1) + more < 0:
            continue  # no result at all
        wanted = F.conv_transpose2d(x, weight, None, stride, padding, more, groups, dilation)
        sizes = TransposedConvolution(
            (kernel, kernel), *((number, number) for number in (stride, padding, more, dilation)), groups
        )
        torch.testing.assert_close(plain(sizes, weight, x), wanted)


SIZES = {
    "one dimension": (LAYERS[1](4, 6, 4, 3, 1, 1, groups=2, bias=False), (2, 4, 7)),
    "sizes of their own": (LAYERS[2](4, 3, (2, 5), (1, 3), (0, 2), (0, 1), bias=False, dilation=(2, 1)), (1, 4, 5, 6)),
    "three dimensions": (LAYERS[3](4, 3, (3, 2, 1), (2, 2, 1), 0, (1, 0, 0), bias=False), (1, 4, 3, 4, 5)),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_read_from_a_graph(name):
    layer, shape = SIZES[name]
    x = torch.randn(shape)
    node = exported(layer, x)
    sizes = TransposedConvolution.of(node, tuple(layer.weight.shape))
    rows = x.unsqueeze(2) if x.dim() == 3 else x
    made = plain(sizes, layer.weight, rows)
    torch.testing.assert_close(made.squeeze(2) if x.dim() == 3 else made, layer(x))


def test_a_kernel_as_wide_as_its_stride_is_a_convolution_with_one_pixel():
    sizes = TransposedConvolution((2, 2), (2, 2), (0, 0), (0, 0), (1, 1), 1)
    assert (sizes.steps, sizes.phases, sizes.plain_padding, sizes.crop) == ((1, 1), 4, (0, 0), [(0, 0), (0, 0)])


def test_channels_go_by_group_and_phase():
    sizes = TransposedConvolution((1, 1), (1, 2), (0, 0), (0, 1), (1, 1), 2)
    weight = torch.arange(1.0, 7).reshape(2, 3, 1, 1)
    assert sizes.plain_weight(weight).flatten().tolist() == [1, 2, 3, 0, 0, 0, 4, 5, 6, 0, 0, 0]
    assert sizes.plain_channels(torch.arange(6)).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


def test_what_engines_are_timed_with_is_what_is_lowered():
    sizes = TransposedConvolution((2, 2), (2, 2), (0, 0), (0, 0), (1, 1), 2)
    made = torch.randn(1, 24, 3, 4).contiguous(memory_format=torch.channels_last)
    lowered = sizes.interleave(made, lambda op, *args: op(*args))
    timed = _interleaved(sizes, made)
    assert timed.is_contiguous()
    assert torch.equal(timed.reshape(1, 6, 8, 6).permute(0, 3, 1, 2), lowered)
