"""Limits of the XNNPACK delegate, as conditions on nodes and matches. Each answers True, or the reason why not."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from quant2e.annotation.pattern import Match
from quant2e.graph.constants import Constants
from quant2e.graph.data_movement import Effect, movement
from quant2e.graph.dataflow import literal, operand
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.places import slicings
from quantizers.kit.conditions import spatial, value, zero_padding


def up_to_two_dimensions(node: Node) -> bool | str:
    """A convolution, not a transposed one, over one or two dimensions."""
    if operand(node, "transposed"):
        return "it is a transposed convolution"
    dimensions = spatial(node)
    return True if dimensions <= 2 else f"XNNPACK has no convolution in {dimensions} dimensions"


def deconvolution_2d(node: Node) -> bool | str:
    """A transposed convolution over two dimensions."""
    if not operand(node, "transposed"):
        return "it is not a transposed convolution"
    return True if spatial(node) == 2 else "XNNPACK has transposed convolutions in two dimensions only"


def stride_within_kernel(node: Node) -> bool | str:
    """A pooling whose windows leave no gaps."""
    kernel, stride = _pair(literal(node, "kernel_size")), _pair(literal(node, "stride") or literal(node, "kernel_size"))
    if stride[0] > kernel[0] or stride[1] > kernel[1]:
        return f"its stride {stride} exceeds its kernel {kernel}"
    if operand(node, "ceil_mode") and not all(isinstance(size, int) for size in value(node).shape):
        return "ceil_mode needs static shapes"
    return True


def _pair(size: int | list[int]) -> tuple[int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes[0], sizes[-1]


def pools_sequences(node: Node) -> bool | str:
    """A pooling over one dimension, in a batch, whose windows leave no gaps."""
    before = node_tensor(operand(node, 0))
    if before is not None and before.dim() != 3:
        return "its input has no batch dimension"
    return stride_within_kernel(node)


def over_image(node: Node) -> bool | str:
    """A mean over the two last of four dimensions. XNNPACK keeps them, and a reshape behind it removes them."""
    before, dims = node_tensor(operand(node, 0)), literal(node, "dim")
    if before is None or before.dim() != 4 or sorted(d % 4 for d in dims or ()) != [2, 3]:
        return "XNNPACK averages over the two last of four dimensions only"
    return True if operand(node, "dtype") is None else "it changes the dtype"


def to_one_value(node: Node) -> bool | str:
    """An adaptive pooling that averages a whole image, or a whole sequence, to one value per channel."""
    before, dimensions = node_tensor(operand(node, 0)), spatial(node)
    if before is None or before.dim() != dimensions + 2:
        return "its input has no batch dimension"
    ones = tuple(value(node).shape[2:]) == (1,) * dimensions
    return True if ones else "XNNPACK averages integers to one value per channel only"


def ungrouped(match: Match) -> bool | str:
    """A transposed convolution with one group."""
    groups = operand(match.edges["w"][1], "groups")
    return True if groups == 1 else f"with groups={groups} XNNPACK takes per-tensor weights only"


def dense_2d(match: Match) -> bool | str:
    """A convolution over two dimensions, of groups of several channels; a transposed one, of one group."""
    _, node = match.edges["w"]
    if spatial(node) != 2:
        return "XNNPACK has dynamic convolutions in two dimensions only"
    groups = operand(node, "groups")
    before = node_tensor(operand(node, 0))
    if before is not None and before.shape[1] == groups:
        return "XNNPACK has no dynamic convolution of one channel per group"
    transposed = operand(node, "transposed") or "transpose" in str(node.target)
    return ungrouped(match) if transposed else True


def of_four_bits(match: Match, group_size: int | None) -> bool | str:
    """A linear whose weight XNNPACK can store in 4 bits: pairs of values, or groups of a multiple of 32."""
    weight, node = match.edges["w"]
    tensor = weight.meta.get("val")
    columns = (tensor if isinstance(tensor, Tensor) else value(operand(node, 0))).shape[-1]
    step = group_size or 2
    return True if columns % step == 0 else f"its {columns} inputs are no multiple of {step}, as 4 bits need"


def pads_image(node: Node) -> bool | str:
    """A padding that the delegate computes with the convolution behind it: zeros, around the spatial dimensions."""
    if (answer := zero_padding(node)) is not True:
        return answer
    sizes, image = literal(node, "pad"), node_tensor(operand(node, 0))
    if sizes is None or image is None or any(not isinstance(size, int) or size < 0 for size in sizes):
        return "its sizes are not fixed, or it crops"
    spatial_only = not any(sizes[2 * (image.dim() - 2) :])
    return True if spatial_only and any(sizes) else "it does not pad the spatial dimensions"


def moves_inside(node: Node, constants: Constants) -> bool | str:
    """An op that moves values and is views, permutations, slices and concatenations to the delegate."""
    row = movement(node.target)
    if row is None or row.effect in (Effect.SAME, Effect.RESHAPE, Effect.PERMUTE, Effect.SHUFFLE):
        return True
    if row.effect is Effect.PAD and zero_padding(node) is True:
        return True
    if row.effect in (Effect.SPLIT, Effect.SELECT) or (
        row.effect is Effect.SLICE and operand(node, "step") in (None, 1)
    ):
        return _has_fixed_sizes(node) or "XNNPACK slices tensors of fixed sizes only"
    if row.effect is Effect.ZEROS:
        return "XNNPACK has no kernel for it"
    found = slicings(node, constants)
    return f"XNNPACK has no kernel for it: {found}" if isinstance(found, str) else True


def _has_fixed_sizes(node: Node) -> bool:
    tensors = [node_tensor(operand(node, 0)), *tree_leaves(node.meta.get("val"))]
    return all(isinstance(size, int) for tensor in tensors if isinstance(tensor, Tensor) for size in tensor.shape)
