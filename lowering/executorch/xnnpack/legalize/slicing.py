"""Values at places along axes as slices, concatenations and views.

    index_select(x, 2, [3, 0, 1])  =  cat(x[:, :, 3:4], x[:, :, 0:2]; 2)
    flip(x; 3)                     =  slices, the last one first
    x[:, ::2]                      =  view(x; [.., 2, ..])[:, 0:1]
    upsample_nearest(x, by n)      =  cat of n views [.., 1, ..]

    alias(x), detach(x)            =  x       select_copy  =  select       native_channel_shuffle  =  channel_shuffle

    im2col(x; by k × l)  =  rows and columns of pad(x), window by window, k and l in front     or, side by side,
                         =  axes of pad(x), split and permuted

XNNPACK slices, concatenates and views; other ops that move values it leaves to kernels, between two delegates. Moving
values is exact: what is read from integers stays between integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.data_movement import requantized
from lowering.executorch.xnnpack.legalize.requirements import fixed, unary
from quant2e.annotation.pattern import Match
from quant2e.graph.constants import Constants
from quant2e.graph.data_movement import MOVEMENTS, Effect, movements
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_constant
from quant2e.graph.fake_values import node_tensor, shape_of
from quant2e.graph.places import Runs, Slicing, slicings
from quant2e.graph.qdq_ops import qd
from quant2e.passes.rewrite import Rewrite

_ATEN = torch.ops.aten
_QUANTIZE, _DEQUANTIZE = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default
_MOVED = movements(Effect.REORDER, Effect.PICK, Effect.REPEAT, Effect.SLICE) | {_ATEN.pad.default}
_SAME = movements(Effect.SAME) - {_ATEN.clone.default, _ATEN.contiguous.default}


def plain_spellings(module: GraphModule) -> int:
    """Spell copies of views as the views, and let readers of what stays in its place read that; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in MOVEMENTS:
            continue
        if node.target in _SAME and _dtype(node) is _dtype(node.args[0]):
            readers = [user for user in node.users if user.op != "output"]
            node.replace_all_uses_with(node.args[0], delete_user_cb=lambda user: user.op != "output")
            count += bool(readers)
        elif (plain := _plain(node.target)) is not None:
            node.target = plain
            count += 1
    return count


def _dtype(node: Any) -> torch.dtype | None:
    tensor = node_tensor(node)
    return None if tensor is None else tensor.dtype


def _plain(target: Any) -> Any:
    """The overload that an op is a copy of, or another name of; None for others."""
    if target is _ATEN.native_channel_shuffle.default:
        return _ATEN.channel_shuffle.default
    if MOVEMENTS[target].effect is Effect.PERMUTE:
        return None  # XNNPACK has the copy, and eager products of what is not one add in another order
    name, _, overload = str(target).removeprefix("aten.").partition(".")
    for suffix in ("_copy", "unsafe_"):
        packet = getattr(_ATEN, name.replace(suffix, ""), None) if suffix in name else None
        if packet is not None and overload in packet.overloads():
            return getattr(packet, overload)
    return None


def few_slices(module: GraphModule) -> int:
    """Rewrite ops that take float32 values from fixed places along axes, where few slices do; returns how many."""
    found = [node for node in module.graph.nodes if node.op == "call_function" and _is_moved(node)]
    constants = Constants(module.graph) if found else None
    count = 0
    for node in found:
        assert constants is not None, "made where something was found"
        along = slicings(node, constants)
        if isinstance(along, str):
            continue
        mover = _Mover(node, operand(node, 0))
        result = mover.moved(along)
        node.replace_all_uses_with(result)
        module.graph.erase_node(node)
        mover.close(result)
        count += 1
    return count


def _is_moved(node: Node) -> bool:
    if node.target not in _MOVED or _dtype(operand(node, 0)) is not torch.float32:
        return False
    return not (node.target is _ATEN.slice.Tensor and operand(node, "step") == 1)


@dataclass(frozen=True, slots=True)
class _Mover:
    """What moves the values of ``source`` in the place of ``node``: on the grid of ``source``, where it has one.

    Slices and concatenations are along the middle of three axes: ExecuTorch 1.4 confuses the axes of four, where images
    that are stored with their channels last meet others.
    """

    node: Node
    source: Node

    def moved(self, along: tuple[Slicing, ...]) -> Node:
        """The result of the node."""
        x, shape = self.source, [int(size) for size in shape_of(self.source)]
        sizes = [*[1] * (len(along) - len(shape)), *shape]
        for axis, slicing in enumerate(along):
            x, sizes = self._along(x, sizes, axis, slicing)
        return self._emit(x, _ATEN.reshape.default, sizes)

    def close(self, result: Node) -> None:
        """Quantize the result again, unless all that reads it does."""
        grid = self._grid()
        if grid is None or all(user.target is _QUANTIZE and user.args[1:] == grid for user in result.users):
            return
        users = list(result.users)
        pair = requantized(result.next, result, grid)
        for user in users:
            user.replace_input_with(result, pair)

    def _along(self, x: Node, sizes: list[int], axis: int, slicing: Slicing) -> tuple[Node, list[int]]:
        """``x``, which holds the values of a tensor of ``sizes``, sliced along an axis; and the sizes of that."""
        before, behind = sizes[:axis], sizes[axis + 1 :]
        if isinstance(slicing, Runs):
            if slicing.is_whole:
                return x, sizes
            around = math.prod(before), math.prod(behind)
            return self._joined(x, around, slicing), [*before, slicing.count, *behind]
        split = [*before, slicing.outer.size, slicing.inner.size, *behind]
        x, split = self._along(x, split, axis, slicing.outer)
        x, split = self._along(x, split, axis + 1, slicing.inner)
        return x, [*before, split[axis] * split[axis + 1], *behind]

    def _joined(self, x: Node, around: tuple[int, int], runs: Runs) -> Node:
        shape = [around[0], runs.size, around[1]]
        # XNNPACK wants different tensors to concatenate: one view for each copy of the whole
        wholes = [self._emit(x, _ATEN.reshape.default, shape) for span in runs.spans if span == (0, runs.size)]
        whole = wholes[0] if wholes else self._emit(x, _ATEN.reshape.default, shape)
        parts = [
            wholes.pop() if span == (0, runs.size) else self._emit(whole, _ATEN.slice.Tensor, 1, *span)
            for span in runs.spans
        ]
        return self._emit(parts, _ATEN.cat.default, 1) if len(parts) > 1 else parts[0]

    def _emit(self, x: Node | list[Node], target: Any, *arguments: Any) -> Node:
        """A call on what was moved so far, quantized again before it is moved further."""
        parts = [self._quantized(part) for part in (x if isinstance(x, list) else [x])]
        return emit(self.node, target, parts if isinstance(x, list) else parts[0], *arguments)

    def _quantized(self, x: Node) -> Node:
        grid = self._grid()
        return x if x is self.source or grid is None else requantized(self.node, x, grid)

    def _grid(self) -> tuple[object, ...] | None:
        source = self.source
        known = source.target is _DEQUANTIZE and not source.kwargs.get("out_dtype")
        return tuple(source.args[1:]) if known else None


def _is_image(node: Node) -> bool | str:
    shape = shape_of(operand(node, 0))
    return (len(shape) == 4 and fixed(*shape)) or f"'{node.name}' has sizes that vary, or no batch"


def _windows(module: GraphModule, match: Match) -> Node:
    node, x = match.root, match.edges["x"][0]
    kernel, dilation, padding, stride = (list(operand(node, place)) for place in range(1, 5))
    if any(padding):
        x = emit(node, _ATEN.constant_pad_nd.default, x, [padding[1], padding[1], padding[0], padding[0]], 0.0)
    batch, channels, *sizes = (int(size) for size in shape_of(x))
    counts = [(n - d * (k - 1) - 1) // s + 1 for n, k, d, s in zip(sizes, kernel, dilation, stride, strict=True)]
    if stride == kernel and dilation == [1, 1]:
        for axis, count, size in zip((2, 3), counts, kernel, strict=True):
            x = emit(node, _ATEN.slice.Tensor, x, axis, 0, count * size)
        split = [batch, channels, counts[0], kernel[0], counts[1], kernel[1]]
        turned = emit(node, _ATEN.permute.default, emit(node, _ATEN.reshape.default, x, split), [0, 1, 3, 5, 2, 4])
    else:
        for axis, count, size, apart, step in zip((2, 3), counts, kernel, dilation, stride, strict=True):
            places = torch.arange(size)[:, None] * apart + torch.arange(count) * step
            taken: Any = emit_constant(module, node, "window_places", places.flatten())
            x = emit(node, _ATEN.index_select.default, x, axis, taken)
        split = [batch, channels, kernel[0], counts[0], kernel[1], counts[1]]
        turned = emit(node, _ATEN.permute.default, emit(node, _ATEN.reshape.default, x, split), [0, 1, 2, 4, 3, 5])
    return emit(node, _ATEN.reshape.default, turned, list(shape_of(node)))


windows_as_places = Rewrite("windows_as_places", unary(_ATEN.im2col.default, when=_is_image), _windows)
"""Windows of images of fixed size. ExecuTorch takes ``im2col`` (``F.unfold``) apart itself, with a padding that XNNPACK
loads on floats only."""
