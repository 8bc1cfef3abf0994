"""Savable graphs: one in which every value is known, and which the example inputs fit; or why it cannot be saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import Dim
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from quant2e.errors import CaptureError, Quant2eError, where
from quant2e.graph.attributes import tensor_at
from quant2e.graph.captured.capture import as_graph_module
from quant2e.graph.captured.inputs import Inputs, distinct, inputs_of, leaf_paths
from quant2e.graph.captured.module import CapturedModule, copy_graph
from quant2e.graph.fake_values import fake_mode, faked, value_of_call


def savable(module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> CapturedModule:
    """``module`` itself, or a copy with the values that it lacks; it shares its tensors.

    A graph that does not know what it was captured with (it was pickled, say) is exported once more, with
    ``dynamic_shapes``. Raises `Quant2eError` for a graph of other things than ops, and when the inputs do not fit.
    """
    gm = module if isinstance(module, CapturedModule) else as_graph_module(module)
    for node in gm.graph.nodes:
        if node.op in ("call_module", "call_method"):
            raise Quant2eError(f"{where(node)} is no op: a file holds graphs of ops, so convert this one first")
    if any(node.op == "placeholder" and "val" not in node.meta for node in gm.graph.nodes):
        return _exported(gm, args, kwargs, dynamic_shapes)
    try:
        inputs_of(gm).check(args, kwargs)
    except CaptureError as error:
        raise Quant2eError(f"the quantized graph cannot be saved with these example inputs: {error}") from error
    _check_dynamic_shapes(gm, dynamic_shapes)
    return gm if not any(map(_lacks_value, gm.graph.nodes)) else _with_values(gm)


def _exported(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> CapturedModule:
    try:
        own_args, own_kwargs = distinct(args, kwargs)
        program = torch.export.export(gm, own_args, own_kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        return as_graph_module(program)
    except Exception as error:
        raise Quant2eError(f"the quantized graph cannot be exported with these inputs: {error}") from error


def _lacks_value(node: Node) -> bool:
    returns = node.target._schema.returns if isinstance(node.target, OpOverload) else True
    return node.op == "call_function" and "val" not in node.meta and bool(returns)


def _with_values(gm: CapturedModule) -> CapturedModule:
    """A copy in which the values that are missing are worked out from those of the operands."""
    copied = copy_graph(gm, compiled=False)
    for node in copied.graph.nodes:
        if (tensor := tensor_at(copied, node)) is not None and "val" not in node.meta:
            node.meta["val"] = faked(tensor, fake_mode(node))
        if not _lacks_value(node):
            continue
        try:
            value = value_of_call(node)
        except Exception as error:
            raise Quant2eError(f"what {where(node)} gives cannot be worked out: {error}") from error
        if value is None:
            raise Quant2eError(f"what {where(node)} gives is not known: capture the model again")
        node.meta["val"] = value
    return copied


def _check_dynamic_shapes(gm: CapturedModule, shapes: Any) -> None:
    """Raise `Quant2eError` when a size varies by ``shapes`` and is fixed in the graph, which no file can change."""
    convention = inputs_of(gm)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    paths = leaf_paths(convention.names, convention.spec)
    asked = _by_leaf(convention, shapes)
    for node, path, sizes in zip(placeholders, paths, asked, strict=True):
        value = node.meta["val"]
        for dimension in sizes if isinstance(value, Tensor) else ():
            if dimension < value.dim() and type(value.shape[dimension]) is int:
                raise Quant2eError(
                    f"size {dimension} of the input {path} varies by dynamic_shapes, and the graph was captured for "
                    f"{value.shape[dimension]}: give dynamic_shapes to quantize or capture, and quantize again"
                )


def _by_leaf(convention: Inputs, shapes: Any) -> list[tuple[int, ...]]:
    """For each flat input the dimensions that vary by ``shapes``, in any form that ``torch.export`` takes."""
    count = len(convention.names)
    specs: list[pytree.TreeSpec] = [pytree.treespec_leaf()] * count
    if convention.spec is not None:
        specs = [*convention.spec.child(0).children(), *convention.spec.child(1).children()]
    if isinstance(shapes, Mapping):
        given = [shapes.get(name) for name in convention.names]
    else:
        given = list(shapes) if isinstance(shapes, (list, tuple)) else []
    given += [None] * (count - len(given))
    return [sizes for spec, shape in zip(specs, given, strict=False) for sizes in _within(spec, shape)]


def _within(spec: pytree.TreeSpec, shape: Any) -> Iterator[tuple[int, ...]]:
    if spec.is_leaf():
        sizes = shape.items() if isinstance(shape, Mapping) else enumerate(shape if isinstance(shape, Sequence) else ())
        yield tuple(dimension for dimension, size in sizes if _varies(size))
        return
    children = spec.children()
    if isinstance(shape, Mapping) and isinstance(spec.context, list):
        parts = [shape.get(key) for key in spec.context]
    else:
        parts = list(shape) if isinstance(shape, Sequence) else []
    parts += [None] * (len(children) - len(parts))
    for child, part in zip(children, parts, strict=False):
        yield from _within(child, part)


def _varies(size: Any) -> bool:
    """Whether a size has to vary; ``Dim.AUTO`` leaves it to the graph."""
    return isinstance(size, Dim) or repr(size).startswith("DimHint(DYNAMIC")
