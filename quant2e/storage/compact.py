"""Compact constants: what only quantize and dequantize ops read, in fewer bytes of a file and with the same values.

    integers of 4 bits                 cat([p & 15, p >> 4], axis).to(dtype) + low          two to a byte in p
    integers of 2 bits                 cat([p & 3, p >> 2 & 3, p >> 4 & 3, p >> 6], axis)   four to a byte
    one integer at all places          z.repeat(sizes)                                      zero points of zero
    integers of 8 bits                 z.to(dtype)
    float32 that is bfloat16           s.to(float32)                                        scales rounded to it

In a file these are ops of the graph, in place of the constants that they give, so that ``torch.export.load`` reads it
as it reads any program. `load` puts the constants back: in memory, and for every lowering, a graph looks as it did.
What a constant is written as follows from its values, so that nothing is lost whatever made them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quant2e.graph.attributes import attribute, tensor_at
from quant2e.graph.captured.module import CapturedModule, copy_graph
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import fake_mode, faked, node_tensor, value_of_call
from quant2e.graph.mutation import written_nodes
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE

aten = torch.ops.aten

_BYTES_OF_AN_OP = 450
"""What one more op takes in the JSON of a program, about: a constant is written shorter where that is less."""

_READERS = DEQUANTIZE | QUANTIZE
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Short:
    """A constant in a shorter form: what is stored, and the ops that give the constant back, each with the arguments
    behind its tensor. ``bits``, ``axis``: where several integers share a byte, which are unpacked first.
    """

    stored: Tensor
    calls: tuple[tuple[Any, tuple[Any, ...]], ...]
    bits: int = 8
    axis: int = 0

    @property
    def ops(self) -> int:
        """How many ops give the constant back."""
        per = 8 // self.bits
        return len(self.calls) + (2 * per - 1 if per > 1 else 0)


def with_compact_constants(gm: CapturedModule) -> CapturedModule:
    """``gm``, or where constants of it have a shorter form a copy that reads them so; other tensors are shared."""
    short = {path: form for path, nodes in _constants(gm).items() if (form := _shortest(gm, nodes)) is not None}
    if not short:
        return gm
    copied = copy_graph(gm, compiled=False)
    for path, nodes in _constants(copied).items():
        if path in short:
            _write(copied, path, nodes, short[path])
    return copied


def _constants(gm: GraphModule) -> dict[str, list[Node]]:
    """Buffers that nothing but quantize and dequantize ops reads, and nothing writes; with the nodes that read them."""
    nodes: dict[str, list[Node]] = defaultdict(list)
    written, shared = written_nodes(gm.graph), Counter(map(_memory, _buffers(gm)))
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            nodes[str(node.target)].append(node)
    return {
        path: readers
        for path, readers in nodes.items()
        if all(user.target in _READERS for node in readers for user in node.users)
        and not written.intersection(readers)
        and (value := tensor_at(gm, readers[0])) is not None
        and _plain(gm, path, value)
        and shared[_memory(value)] == 1
    }


def _buffers(gm: GraphModule) -> Iterator[Tensor]:
    return (buffer for _, buffer in gm.named_buffers(remove_duplicate=False))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if type(tensor) is Tensor else 0


def _plain(gm: GraphModule, path: str, value: Tensor) -> bool:
    """Whether a tensor is a buffer with memory of its own, in the usual order."""
    prefix, _, name = path.rpartition(".")
    owned = name in gm.get_submodule(prefix)._buffers
    return (
        owned and type(value) is Tensor and not value.is_meta and value.dim() > 0 and value.numel() > 0
        and value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.itemsize
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- writing


def _shortest(gm: GraphModule, nodes: list[Node]) -> _Short | None:
    """The shorter form of a constant; None where it has none, or none that is worth its ops."""
    value = tensor_at(gm, nodes[0])
    assert value is not None
    size = value.numel() * value.itemsize
    if size < _BYTES_OF_AN_OP:
        return None
    if value.dtype is torch.float32:
        form = _short_float(value)
    else:
        quantized = any(operand(user, "input") is node for node in nodes for user in node.users)
        form = _short_integers(value, repeats=not quantized)
    if form is None:
        return None
    saved = size - form.stored.numel() * form.stored.itemsize
    return form if saved > _BYTES_OF_AN_OP * form.ops else None


def _short_float(value: Tensor) -> _Short | None:
    rounded = value.to(torch.bfloat16)
    same = torch.equal(rounded.to(torch.float32), value)
    return _Short(rounded, ((aten.to.dtype, (torch.float32,)),)) if same else None


def _short_integers(value: Tensor, *, repeats: bool) -> _Short | None:
    """``repeats``: whether one value may stand for all, as of zero points, of which there are as many as scales."""
    if value.dtype not in _INTEGERS:
        return None
    low, high = (int(bound) for bound in value.aminmax())
    if repeats and low == high:
        return _Short(value.reshape(-1)[:1].clone(), ((aten.repeat.default, (list(value.shape),)),))
    for bits in (2, 4):
        if high - low < 1 << bits:
            return _packed(value, bits, _origin_of(low, high, bits))
    for narrow in (torch.int8, torch.uint8):
        bounds = torch.iinfo(narrow)
        if value.itemsize > 1 and bounds.min <= low and high <= bounds.max:
            return _Short(value.to(narrow), ((aten.to.dtype, (value.dtype,)),))
    return None


def _origin_of(low: int, high: int, bits: int) -> int:
    """What is subtracted before packing: nothing, or the smallest integer of so many bits, where either will do."""
    half = 1 << (bits - 1)
    if low >= 0 and high < 2 * half:
        return 0
    return -half if -half <= low and high < half else low


def _packed(value: Tensor, bits: int, low: int) -> _Short:
    per, sizes = 8 // bits, value.shape
    axis = next((axis for axis, size in enumerate(sizes) if size % per == 0), 0)
    digits = (value - low).to(torch.uint8)
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    if missing := -sizes[axis] % per:
        digits = torch.cat([digits, digits.new_zeros(missing, *sizes[1:])])
        calls.append((aten.slice.Tensor, (0, 0, sizes[0])))
    if value.dtype is not torch.uint8:
        calls.append((aten.to.dtype, (value.dtype,)))
    if low:
        calls.append((aten.add.Tensor, (low,)))
    packed = torch.zeros_like(digits.chunk(per, axis)[0], memory_format=torch.contiguous_format)
    for index, part in enumerate(digits.chunk(per, axis)):
        packed |= part << (bits * index)
    return _Short(packed, tuple(calls), bits, axis)


def _write(gm: GraphModule, path: str, nodes: list[Node], form: _Short) -> None:
    """Let the readers of a constant read it from its shorter form."""
    first, *others = nodes
    _put(gm, path, form.stored)
    readers = [user for node in nodes for user in node.users]
    first.meta = {"val": faked(form.stored, fake_mode(first))}
    last = _unpack(first, form.bits, form.axis)
    for target, args in form.calls:
        last = _behind(last, target, last, *args)
    for user in readers:
        for node in nodes:
            user.replace_input_with(node, last)
    for node in others:
        gm.graph.erase_node(node)


def _unpack(packed: Node, bits: int, axis: int) -> Node:
    per, mask, last, parts = 8 // bits, (1 << bits) - 1, packed, []
    if per == 1:
        return packed
    for index in range(per):
        part = packed
        if index:
            part = last = _behind(last, aten.bitwise_right_shift.Tensor_Scalar, part, bits * index)
        if index < per - 1:
            part = last = _behind(last, aten.bitwise_and.Scalar, part, mask)
        parts.append(part)
    return _behind(last, aten.cat.default, parts, axis)


def _behind(place: Node, target: Callable[..., Any], *args: Any) -> Node:
    with place.graph.inserting_after(place):
        node = place.graph.call_function(target, args)
    node.meta["val"] = value_of_call(node)
    return node


def _put(gm: GraphModule, path: str, value: Tensor) -> None:
    """Give a buffer another value, under its name and as persistent as it is."""
    prefix, _, name = path.rpartition(".")
    owner: nn.Module = gm.get_submodule(prefix)
    owner._buffers[name] = value


# ------------------------------------------------------------------------------------------------------------- reading


def restore_constants(gm: GraphModule) -> int:
    """Put constants in place of the ops that `with_compact_constants` wrote, in place; returns how many.

    Ops in any other form stay, also where they come close: a graph says what it computes either way.
    """
    found: dict[Node, Node] = {}
    held, scales = _of_their_own(gm), set[str]()
    for node in gm.graph.nodes:
        for given in node.all_input_nodes if node.target in _READERS else ():
            if given not in found and (leaf := _stored(gm, given, node, scales)) is not None:
                found[given] = leaf
    leaves = Counter(found.values())
    count = 0
    for last, leaf in found.items():
        if leaf.target in held and leaves[leaf] == 1 and _only_serves(last, leaf):
            _restore(gm, last, leaf)
            count += 1
    if count:
        gm.recompile()
    return count


def _of_their_own(gm: GraphModule) -> set[str]:
    """Buffers that one node reads, and whose memory is that of no other buffer: in these another value can be put."""
    nodes = Counter(str(node.target) for node in gm.graph.nodes if node.op == "get_attr")
    shared = Counter(map(_memory, _buffers(gm)))
    return {
        path
        for path, buffer in gm.named_buffers(remove_duplicate=False)
        if nodes[path] == 1 and shared[_memory(buffer)] == 1
    }


def _stored(gm: GraphModule, last: Node, reader: Node, scales: set[str]) -> Node | None:
    """The constant of which ``last``, read by ``reader``, is the longer form; None for anything else, as what a model
    itself computes of its buffers, ``position + x`` say. ``scales``: those that zero points were repeated for.
    """
    if last.target is aten.repeat.default:
        leaf = _repeated(gm, last, reader, scales)
    else:
        leaf = _unpacked(gm, last) or _cast(gm, last)
    value = None if leaf is None else tensor_at(gm, leaf)
    if leaf is None or value is None or not _plain(gm, str(leaf.target), value):
        return None
    return leaf


def _unpacked(gm: GraphModule, last: Node) -> Node | None:
    """The bytes that ``last`` is unpacked from, by the ops of `_packed` in their order."""
    low = _last_argument(last, aten.add.Tensor)
    node = last if low is None else last.all_input_nodes[0]
    dtype = _last_argument(node, aten.to.dtype)
    node, dtype = (node, torch.uint8) if dtype is None else (node.all_input_nodes[0], dtype)
    if dtype not in _INTEGERS or not (low is None or (type(low) is int and _fits(low, dtype))):
        return None
    if node.target is aten.slice.Tensor and len(node.args) == 4 and node.args[1:3] == (0, 0):
        node = node.all_input_nodes[0]
    leaf = _packed_in(node) if node.target is aten.cat.default else None
    stored = None if leaf is None else tensor_at(gm, leaf)
    return leaf if stored is not None and stored.dtype is torch.uint8 else None


def _cast(gm: GraphModule, last: Node) -> Node | None:
    """The constant that ``last`` casts, as `_short_float` and `_short_integers` write it."""
    dtype = _last_argument(last, aten.to.dtype)
    stored = tensor_at(gm, last.args[0]) if dtype is not None else None
    if stored is None:
        return None
    floats = stored.dtype is torch.bfloat16 and dtype is torch.float32
    integers = stored.dtype in (torch.int8, torch.uint8) and dtype in _INTEGERS
    return last.all_input_nodes[0] if floats or integers else None


def _fits(value: int, dtype: torch.dtype) -> bool:
    return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _last_argument(node: Node, target: Callable[..., Any]) -> Any:
    """What a call of ``target`` has behind its tensor, if it is one of these with two arguments."""
    plain = node.target is target and len(node.args) == 2 and not node.kwargs and isinstance(node.args[0], Node)
    return node.args[1] if plain else None


def _packed_in(cat: Node) -> Node | None:
    """The bytes that ``cat`` puts the parts of next to each other, as `_unpack` writes it."""
    parts = cat.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) not in (2, 4):
        return None
    bits = 8 // len(parts)
    leaves = set()
    for index, part in enumerate(parts):
        node = part
        if index < len(parts) - 1:
            node = _operand_of(node, aten.bitwise_and.Scalar, (1 << bits) - 1)
        if index:
            node = _operand_of(node, aten.bitwise_right_shift.Tensor_Scalar, bits * index)
        leaves.add(node)
    leaf = leaves.pop()
    return leaf if not leaves and isinstance(leaf, Node) else None


def _operand_of(node: Any, target: Callable[..., Any], number: int) -> Any:
    plain = isinstance(node, Node) and node.target is target and len(node.args) == 2 and node.args[1] == number
    return node.args[0] if plain else None


def _repeated(gm: GraphModule, node: Node, reader: Node, used: set[str]) -> Node | None:
    """The one value of which ``node`` makes as many as ``reader`` has scales, once for a tensor of these: a file gives
    no more for a few bytes.
    """
    leaf, scales = node.args[0], operand(reader, "scales")
    sizes: Any = node.args[1]
    value, count = tensor_at(gm, leaf), node_tensor(scales)
    if value is None or count is None or scales is node or value.numel() != 1 or not isinstance(leaf, Node):
        return None
    plain = isinstance(sizes, (list, tuple)) and all(type(size) is int and size >= 0 for size in sizes)
    held = _held(gm, scales, count)
    if not plain or list(count.shape) != list(sizes) or held is None or held in used:
        return None
    used.add(held)
    return leaf


def _held(gm: GraphModule, scales: Node, count: Tensor) -> str | None:
    """The tensor of so many scales that the file has; None where it only says that it has one."""
    node = scales.args[0] if scales.target is aten.to.dtype else scales
    held = tensor_at(gm, node)
    return str(node.target) if isinstance(node, Node) and held is not None and held.shape == count.shape else None


def _only_serves(last: Node, leaf: Node) -> bool:
    """Whether nothing but ``last`` is made of ``leaf``, and nothing but quantize and dequantize ops reads it."""
    inner = set(_between(last, leaf))
    return all(user.target in _READERS for user in last.users) and all(
        user in inner for node in (inner | {leaf}) - {last} for user in node.users
    )


def _between(last: Node, leaf: Node) -> list[Node]:
    """The ops that make ``last`` of ``leaf``, each behind those that it reads."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node is not leaf and node not in found:
            for given in node.all_input_nodes:
                visit(given)
            found[node] = None

    visit(last)
    return list(found)


def _restore(gm: GraphModule, last: Node, leaf: Node) -> None:
    inner = _between(last, leaf)
    values: dict[Node, Tensor] = {leaf: attribute(gm, str(leaf.target))}
    with torch.no_grad():
        for node in inner:
            assert callable(node.target), f"'{node.name}' is an op"
            values[node] = node.target(*map_arg(node.args, values.__getitem__), **node.kwargs)
    value = values[last].contiguous()
    _put(gm, str(leaf.target), value)
    leaf.meta["val"] = faked(value, fake_mode(leaf))
    last.replace_all_uses_with(leaf)
    for node in reversed(inner):
        gm.graph.erase_node(node)
