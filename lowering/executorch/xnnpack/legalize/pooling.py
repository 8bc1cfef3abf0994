"""Pooling as means and padded windows.

mean(x, [2, 3])  =  squeeze(mean(x, [2, 3], keepdim=True)), and average pooling to 1×1 is that mean.

    pool1d(x)          =  squeeze(pool2d(unsqueeze(x, 2)), 2)
    avg_pool2d, padded =  avg_pool2d(pad(x))   where the padding counts

XNNPACK has a kernel for the mean over height and width that keeps both dimensions, and pools images only, averaging
what is inside. Adaptive pooling to a size that divides the input's is pooling with one window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.data_movement import requantized
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit
from quant2e.graph.fake_values import shape_of
from quant2e.graph.qdq_ops import qd

_ATEN = torch.ops.aten
_SEQUENCE_POOLS: Mapping[Any, Any] = {
    _ATEN.max_pool1d.default: _ATEN.max_pool2d.default,
    _ATEN.avg_pool1d.default: _ATEN.avg_pool2d.default,
    _ATEN.adaptive_avg_pool1d.default: _ATEN.adaptive_avg_pool2d.default,
}


def keep_mean_dims(module: GraphModule) -> int:
    """Rewrite means over height and width of NCHW tensors; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(operand(node, 0), Node):
            continue
        mean = _kept(node)
        if mean is not None:
            node.replace_all_uses_with(mean)
            module.graph.erase_node(node)
            count += 1
    return count


def _kept(node: Node) -> Node | None:
    x = operand(node, 0)
    if node.target is _ATEN.adaptive_avg_pool2d.default:
        return _pooled(node, x)
    if node.target is not _ATEN.mean.dim or len(shape_of(x)) != 4 or operand(node, "dtype") is not None:
        return None
    dims = operand(node, "dim")
    if (
        operand(node, "keepdim")
        or not isinstance(dims, list | tuple)
        or sorted(d % 4 for d in dims if isinstance(d, int)) != [2, 3]
    ):
        return None
    mean = emit(node, _ATEN.mean.dim, x, [2, 3], True)
    return emit(node, _ATEN.squeeze.dims, mean, [2, 3])


def _pooled(node: Node, x: Node) -> Node | None:
    """Adaptive pooling to 1×1, or to sizes that divide the input's: then every window is the same."""
    size, shape = operand(node, "output_size"), shape_of(x)
    if not isinstance(size, list | tuple) or len(shape) != 4:
        return None
    if all(s == 1 for s in size):
        return emit(node, _ATEN.mean.dim, x, [2, 3], True)
    pairs = list(zip(shape[2:], size, strict=True))
    if not all(isinstance(i, int) and isinstance(o, int) and o > 0 and i % o == 0 for i, o in pairs):
        return None
    window = [int(i) // int(o) for i, o in pairs]
    return emit(node, _ATEN.avg_pool2d.default, x, window, window, [0, 0], False, False)


def pool_images(module: GraphModule) -> int:
    """Rewrite pooling of sequences as pooling of images of height 1; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        x = operand(node, 0) if node.op == "call_function" and node.target in _SEQUENCE_POOLS else None
        if not isinstance(x, Node):
            continue
        image = emit(node, _ATEN.unsqueeze.default, x, -2)
        if x.target is qd.dequantize_per_tensor.default and not x.kwargs.get("out_dtype"):
            image = requantized(node, image, tuple(x.args[1:]))  # the mean of a whole sequence is one of integers
        if node.target is _ATEN.adaptive_avg_pool1d.default:
            pooled = emit(node, _ATEN.adaptive_avg_pool2d.default, image, [1, *operand(node, "output_size")])
        else:
            pooled = emit(node, _SEQUENCE_POOLS[node.target], image, *_as_image(node))
        node.replace_all_uses_with(emit(node, _ATEN.squeeze.dims, pooled, [-2]))
        module.graph.erase_node(node)
        count += 1
    return count


def _as_image(node: Node) -> list[Any]:
    """Arguments of a pool over sequences, for images of height 1."""
    kernel = list(operand(node, "kernel_size"))
    arguments = [[1, *kernel], [1, *(operand(node, "stride") or kernel)], [0, *operand(node, "padding")]]
    if node.target is _ATEN.max_pool1d.default:
        return [*arguments, [1, *operand(node, "dilation")], operand(node, "ceil_mode")]
    return [*arguments, operand(node, "ceil_mode"), operand(node, "count_include_pad")]


def pad_before_average(module: GraphModule) -> int:
    """Rewrite average pooling whose padding counts as padding and pooling; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.avg_pool2d.default:
            continue
        padding = operand(node, "padding")
        if not any(padding) or not operand(node, "count_include_pad") or operand(node, "ceil_mode"):
            continue
        height, width = padding if len(padding) == 2 else padding * 2
        padded = emit(node, _ATEN.constant_pad_nd.default, node.args[0], [width, width, height, height], 0.0)
        kernel = operand(node, "kernel_size")
        stride, divisor = operand(node, "stride") or kernel, operand(node, "divisor_override")
        pooled = emit(node, _ATEN.avg_pool2d.default, padded, kernel, stride, [0, 0], False, False, divisor)
        node.replace_all_uses_with(pooled)
        module.graph.erase_node(node)
        count += 1
    return count


def explicit_pooling(module: GraphModule) -> int:
    """Spell out what pooling leaves to defaults; returns how many changed.

    A stride that is not given is the kernel size. Average pooling without padding has no padding to count.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in (_ATEN.max_pool2d.default, _ATEN.avg_pool2d.default):
            continue
        x, kernel, *rest = node.args
        stride, padding = rest[0] if rest else [], rest[1] if len(rest) > 1 else [0, 0]
        args = [x, kernel, stride or kernel, padding, *rest[2:]]
        if node.target is _ATEN.avg_pool2d.default and not any(padding) and args[4:5] in ([], [False]):
            args = [*args[:4], False, False, *args[6:]]
        if args != list(node.args):
            node.args = tuple(args)
            count += 1
    return count
