"""Compact constants: what only quantize and dequantize ops read, in its short form (`quant2e.weights.short_form`).

    dequantize(w)        =>        dequantize(cat([p & 15, p >> 4]).to(int8) + low)

In a file these are ops of the graph, in place of the constants that they give, so that ``torch.export.load`` reads it
as it reads any program. `load` puts the constants back: in memory, and for every lowering, a graph looks as it did.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from quant2e.graph.attributes import attribute, tensor_at
from quant2e.graph.captured.module import CapturedModule, copy_graph
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import fake_mode, node_tensor, value_of_call
from quant2e.graph.mutation import written_nodes
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE
from quant2e.stored_tensor import StoredTensor, in_memory
from quant2e.weights.short_form import INTEGERS, Shortened, Shortening, ShortForm, ShortKind, short_form, shortened

aten = torch.ops.aten

_READERS = DEQUANTIZE | QUANTIZE


def with_compact_constants(gm: CapturedModule) -> CapturedModule:
    """``gm``, or where constants of it have a short form a copy that reads them so; other tensors are shared.

    What is stored of them is made when it is read, one after the other, unless the graph holds it already.
    """
    short = {path: form for path, nodes in _constants(gm).items() if (form := _form_of(gm, nodes)) is not None}
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
    return tensor.untyped_storage().data_ptr() if type(tensor) is Tensor else id(tensor)


def _plain(gm: GraphModule, path: str, value: Tensor) -> bool:
    """Whether a tensor is a buffer with memory of its own, in the usual order, or in its short form."""
    prefix, _, name = path.rpartition(".")
    owned = name in gm.get_submodule(prefix)._buffers
    if isinstance(value, StoredTensor):
        return owned and isinstance(value.place, Shortened | Shortening)
    return (
        owned and type(value) is Tensor and not value.is_meta and value.dim() > 0 and value.numel() > 0
        and value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.itemsize
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- writing


def _form_of(gm: GraphModule, nodes: list[Node]) -> ShortForm | None:
    """The short form of a constant; None where it has none."""
    value = tensor_at(gm, nodes[0])
    assert value is not None
    if (place := shortened(value)) is not None:
        return place.form
    quantized = any(operand(user, "input") is node for node in nodes for user in node.users)
    return short_form(value, repeats=not quantized)


def _write(gm: GraphModule, path: str, nodes: list[Node], form: ShortForm) -> None:
    """Let the readers of a constant read it from its short form."""
    first, *others = nodes
    stored = _stored_of(gm, first, form)
    _put(gm, path, stored)
    readers = [user for node in nodes for user in node.users]
    first.meta = {"val": _fake(first, form.stored_shape, form.stored_dtype, stored.device)}
    last = _unpack(first, form.bits, form.axis)
    for target, args in form.calls:
        last = _behind(last, target, last, *args)
    for user in readers:
        for node in nodes:
            user.replace_input_with(node, last)
    for node in others:
        gm.graph.erase_node(node)


def _stored_of(gm: GraphModule, node: Node, form: ShortForm) -> Tensor:
    """What is stored of a constant: on a CPU it is made when it is read."""
    value = tensor_at(gm, node)
    assert value is not None
    if (place := shortened(value)) is not None:
        return place.stored
    if value.device.type != "cpu":
        return form.pack(value)
    return StoredTensor(Shortening(form, value), form.stored_dtype)


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


def _fake(node: Node, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without data, of the fake mode of the graph of ``node``."""
    with fake_mode(node) or contextlib.nullcontext():
        return torch.empty(shape, dtype=dtype, device=device)


def _put(gm: GraphModule, path: str, value: Tensor) -> None:
    """Give a buffer another value, under its name and as persistent as it is."""
    prefix, _, name = path.rpartition(".")
    owner: nn.Module = gm.get_submodule(prefix)
    owner._buffers[name] = value


# ------------------------------------------------------------------------------------------------------------- reading


def restore_constants(gm: GraphModule, *, unpacked: bool = True) -> int:
    """Put constants in place of the ops that `with_compact_constants` wrote, in place; returns how many.

    Ops in any other form stay, also where they come close: a graph says what it computes either way. Not ``unpacked``,
    the constants are `StoredTensor`, in their short form.
    """
    found: dict[Node, tuple[Node, ShortForm]] = {}
    held, scales = _of_their_own(gm), set[str]()
    for node in gm.graph.nodes:
        for given in node.all_input_nodes if node.target in _READERS else ():
            if given not in found and (longer := _longer_form(gm, given, node, scales)) is not None:
                found[given] = longer
    leaves = Counter(leaf for leaf, _ in found.values())
    count = 0
    for last, (leaf, form) in found.items():
        if leaf.target in held and leaves[leaf] == 1 and _only_serves(last, leaf):
            _restore(gm, last, leaf, form, unpacked)
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


def _longer_form(gm: GraphModule, last: Node, reader: Node, scales: set[str]) -> tuple[Node, ShortForm] | None:
    """The constant of which ``last``, read by ``reader``, is the longer form, and that; None for anything else, as what
    a model itself computes of its buffers, ``position + x`` say. ``scales``: those that zero points were repeated for.
    """
    if last.target is aten.repeat.default:
        found = _repeated(gm, last, reader, scales)
    else:
        found = _unpacked(gm, last) or _cast(gm, last)
    value = None if found is None else tensor_at(gm, found[0])
    if found is None or value is None or not _plain(gm, str(found[0].target), value):
        return None
    form = found[1]
    return found if form.stored_shape == tuple(value.shape) and form.stored_dtype is value.dtype else None


def _unpacked(gm: GraphModule, last: Node) -> tuple[Node, ShortForm] | None:
    """The bytes that ``last`` is unpacked from, by the ops of `_write` in their order."""
    low = _last_argument(last, aten.add.Tensor)
    node = last if low is None else last.all_input_nodes[0]
    dtype = _last_argument(node, aten.to.dtype)
    node, dtype = (node, torch.uint8) if dtype is None else (node.all_input_nodes[0], dtype)
    if dtype not in INTEGERS or not (low is None or (type(low) is int and _fits(low, dtype))):
        return None
    end = None
    if node.target is aten.slice.Tensor and len(node.args) == 4 and node.args[1:3] == (0, 0):
        node, end = node.all_input_nodes[0], node.args[3]
    leaf = _packed_in(node) if node.target is aten.cat.default else None
    stored, axis = (None if leaf is None else tensor_at(gm, leaf)), operand(node, "dim")
    if leaf is None or stored is None or type(axis) is not int or not 0 <= axis < stored.dim():
        return None
    sizes, per = list(stored.shape), len(node.all_input_nodes)
    sizes[axis] *= per
    if end is not None:
        if axis or type(end) is not int:
            return None
        sizes[0] = end
    return leaf, ShortForm(
        kind=ShortKind.PACKED,
        shape=tuple(sizes),
        dtype=dtype,
        stored_dtype=torch.uint8,
        bits=8 // per,
        axis=axis,
        low=low or 0,
    )


def _cast(gm: GraphModule, last: Node) -> tuple[Node, ShortForm] | None:
    """The constant that ``last`` casts: floats from bfloat16, integers from 8 bits."""
    dtype = _last_argument(last, aten.to.dtype)
    stored = tensor_at(gm, last.args[0]) if dtype is not None else None
    if stored is None:
        return None
    floats = stored.dtype is torch.bfloat16 and dtype is torch.float32
    integers = stored.dtype in (torch.int8, torch.uint8) and dtype in INTEGERS
    if not (floats or integers):
        return None
    form = ShortForm(kind=ShortKind.CAST, shape=tuple(stored.shape), dtype=dtype, stored_dtype=stored.dtype)
    return last.all_input_nodes[0], form


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


def _repeated(gm: GraphModule, node: Node, reader: Node, used: set[str]) -> tuple[Node, ShortForm] | None:
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
    form = ShortForm(kind=ShortKind.REPEATED, shape=tuple(sizes), dtype=value.dtype, stored_dtype=value.dtype)
    return leaf, form


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


def _restore(gm: GraphModule, last: Node, leaf: Node, form: ShortForm, unpacked: bool) -> None:
    stored = in_memory(attribute(gm, str(leaf.target)))
    value = form.unpack(stored) if unpacked else StoredTensor(Shortened(form, stored), form.dtype)
    _put(gm, str(leaf.target), value)
    leaf.meta["val"] = _fake(leaf, form.shape, form.dtype, stored.device)
    last.replace_all_uses_with(leaf)
    for node in reversed(_between(last, leaf)):
        gm.graph.erase_node(node)
