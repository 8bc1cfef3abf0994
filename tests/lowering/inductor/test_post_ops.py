"""Post ops against the kernels: each activation as the kernel computes it, and those that it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowering.inductor.kernels.post_ops import LINEAR_ONLY, post_op_of

ops = torch.ops.onednn
SCALE, POINT = 0.03, 60
# Weights have seven bits: without VNNI, oneDNN adds products in pairs of 16 bits, and larger ones may overflow.
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "relu, in place": nn.ReLU(inplace=True),
    "hardtanh": nn.Hardtanh(-0.5, 2),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "leaky_relu, in place": nn.LeakyReLU(inplace=True),
    "tanh": nn.Tanh(),
    "gelu": nn.GELU(),
    "gelu, tanh": nn.GELU(approximate="tanh"),
}


def node_of(activation):
    graph = torch.export.export(activation, (torch.randn(3, 4),)).module().graph
    return next(node for node in graph.nodes if node.op == "call_function")


def linear(post_op):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (5, 16), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-63, 64, (8, 16), dtype=torch.int8, generator=generator)
    scales, zeros = torch.rand(8, generator=generator) * 0.04, torch.zeros(8, dtype=torch.int64)
    packed = ops.qlinear_prepack(weight, None)
    made = ops.qlinear_pointwise(x, SCALE, POINT, packed, scales, zeros, None, 1.0, 0, torch.float32, *post_op.args)
    return made, F.linear((x.float() - POINT) * SCALE, weight.float() * scales[:, None])


def convolution(post_op, dimensions=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 4, *[5] * dimensions), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-63, 64, (8, 4, *[3] * dimensions), dtype=torch.int8, generator=generator)
    scales, zeros = torch.rand(8, generator=generator) * 0.006, torch.zeros(8, dtype=torch.int64)
    shape = ([1] * dimensions, [1] * dimensions, [1] * dimensions, 1)
    packed = ops.qconv_prepack(weight, scales, SCALE, POINT, *shape, None)
    made = ops.qconv_pointwise(
        x, SCALE, POINT, packed, scales, zeros, None, *shape, 1.0, 0, torch.float32, *post_op.args
    )
    op = F.conv2d if dimensions == 2 else F.conv3d
    return made, op((x.float() - POINT) * SCALE, weight.float() * scales.view(-1, *[1] * (dimensions + 1)), padding=1)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("kernel", [linear, convolution])
def test_a_kernel_computes_the_activation_or_refuses_it(kernel, name):
    post_op = post_op_of(node_of(ACTIVATIONS[name]))
    if kernel is convolution and post_op.name in LINEAR_ONLY:
        with pytest.raises(RuntimeError, match="Unsupported post op"):
            kernel(post_op)
        return
    made, accumulated = kernel(post_op)
    assert accumulated.min() < -1
    assert accumulated.max() > 2
    torch.testing.assert_close(made, ACTIVATIONS[name](accumulated), rtol=1e-5, atol=1e-5)


def test_a_convolution_in_three_dimensions_takes_no_activation():
    with pytest.raises(RuntimeError, match="Unsupported post op"):
        convolution(post_op_of(node_of(nn.ReLU())), dimensions=3)


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.ELU(), nn.Mish(), nn.Softplus()])
def test_others_are_none(activation):
    assert post_op_of(node_of(activation)) is None


def test_a_clamp_with_one_bound_is_none():
    class Clamp(nn.Module):
        def forward(self, x):
            return x.clamp(max=1.0)

    assert post_op_of(node_of(Clamp())) is None
