"""mean(x, [2, 3])  =  squeeze(mean(x, [2, 3], keepdim=True)), and average pooling to 1×1 is that mean.

XNNPACK has a kernel for the mean over height and width that keeps both dimensions, and for no other mean. Adaptive
pooling to a size that divides the input's is pooling with one window.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from lowering.canonical.edit import emit, shape_of

_ATEN = torch.ops.aten


def keep_mean_dims(module: GraphModule) -> int:
    """Rewrite means over height and width of NCHW tensors; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.args[0] if node.args else None, Node):
            continue
        mean = _kept(node)
        if mean is not None:
            node.replace_all_uses_with(mean)
            module.graph.erase_node(node)
            count += 1
    return count


def _kept(node: Node) -> Node | None:
    x = node.args[0]
    assert isinstance(x, Node)
    if node.target is _ATEN.adaptive_avg_pool2d.default:
        return _pooled(node, x)
    if node.target is not _ATEN.mean.dim or len(shape_of(x)) != 4 or node.kwargs.get("dtype") is not None:
        return None
    dims = node.args[1]
    kept = len(node.args) > 2 and bool(node.args[2])
    if kept or not isinstance(dims, list | tuple) or sorted(d % 4 for d in dims if isinstance(d, int)) != [2, 3]:
        return None
    mean = emit(node, _ATEN.mean.dim, x, [2, 3], True)
    return emit(node, _ATEN.squeeze.dims, mean, [2, 3])


def _pooled(node: Node, x: Node) -> Node | None:
    """Adaptive pooling to 1×1, or to sizes that divide the input's: then every window is the same."""
    size, shape = node.args[1], shape_of(x)
    if not isinstance(size, list | tuple) or len(shape) != 4:
        return None
    if all(s == 1 for s in size):
        return emit(node, _ATEN.mean.dim, x, [2, 3], True)
    pairs = list(zip(shape[2:], size, strict=True))
    if not all(isinstance(i, int) and isinstance(o, int) and o > 0 and i % o == 0 for i, o in pairs):
        return None
    window = [int(i) // int(o) for i, o in pairs]
    return emit(node, _ATEN.avg_pool2d.default, x, window, window, [0, 0], False, False)


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
