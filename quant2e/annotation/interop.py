"""Interoperation with other quantization libraries: annotations, specs and observers recognised by their shape.

A spec with ``edge_or_node`` is shared, with ``derived_from`` derived, with ``scale`` and ``zero_point`` fixed,
otherwise plain. Nothing of the other library is imported, so the quantizers that backends ship run unmodified.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.annotation.plan import DerivedFrom, Edge, Ignored, Output, Plan, Point, SharedWith, resolve_plan
from quant2e.annotation.specs import ANNOTATION
from quant2e.errors import AnnotationError, PlanError, where
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.mutation import ObservableWrite, observable_writes

QUANTIZABLE = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that the quantize ops take."""


def read_plan(gm: GraphModule) -> Plan:
    """The plan that the annotations of ``gm`` ask for.

    Raises `AnnotationError` for an annotation that names what is not an operand, and `PlanError` for shares that
    cannot be resolved.
    """
    specs: dict[Point, Any] = {}
    implicit: set[str] = set()
    ignored: list[Ignored] = []
    nodes = {node.name: node for node in gm.graph.nodes}
    written = observable_writes(gm.graph)
    for node in gm.graph.nodes:
        note = node.meta.get(ANNOTATION)
        if note is None:
            continue
        if getattr(note, "allow_implicit_sharing", True):
            implicit.add(node.name)
        for point, spec in _annotated_points(node, note):
            value = _concrete(spec, point, nodes)
            reason = None if value is None else _unquantizable(nodes, point, written)
            if reason is not None:
                ignored.append(Ignored(point, reason))
                # Whatever shares with this point cannot be quantized either.
                value = None
            specs[point] = value
    return resolve_plan(specs, implicit, tuple(ignored))


def _annotated_points(node: Node, note: Any) -> Iterator[tuple[Point, Any]]:
    """Points of one annotation: inputs in the order of the op's operands, then the output."""
    wanted = getattr(note, "input_qspec_map", None)
    if not hasattr(wanted, "items"):
        raise AnnotationError(
            f"{where(node)}: node.meta['{ANNOTATION}'] is a {type(note).__name__} without an input_qspec_map; "
            "put a QuantizationAnnotation there"
        )
    wanted = dict(wanted or {})
    for src in node.all_input_nodes:
        if src in wanted:
            yield Edge(src.name, node.name), wanted.pop(src)
    for key in wanted:
        raise AnnotationError(_not_an_operand(node, key))
    if note.output_qspec is not None:
        yield Output(node.name), note.output_qspec


def _not_an_operand(node: Node, key: Any) -> str:
    operands = [n.name for n in node.all_input_nodes]
    if not isinstance(key, Node):
        return (
            f"{where(node)}: its annotation puts a spec on the constant {key!r}. Only operands that are nodes can be "
            f"quantized: {', '.join(operands) or 'this node has none'}. Lift the constant to a "
            "buffer first, or drop it."
        )
    if key.name in operands:
        return f"{where(node)}: its annotation puts a spec on a '{key.name}' that is a node of another graph"
    near = difflib.get_close_matches(key.name, operands, n=1)
    return (
        f"{where(node)}: its annotation puts a spec on '{key.name}', which is not an operand of this node "
        f"({', '.join(operands) or 'it has none'})" + (f"; did you mean '{near[0]}'?" if near else "")
    )


def _point(place: Any, by: Point, nodes: dict[str, Node]) -> Point:
    """A reference to an edge or a node, as a point."""
    parts = place if isinstance(place, tuple) else (place,)
    if len(parts) not in (1, 2):
        raise PlanError(f"the spec of ({by}) refers to {place!r}; a point is a node or an edge (producer, consumer)")
    for part in parts:
        if not isinstance(part, Node):
            raise PlanError(
                f"the spec of ({by}) refers to {place!r}, and {part!r} is a constant, not a node of the graph"
            )
        if nodes.get(part.name) is not part:
            raise PlanError(f"the spec of ({by}) refers to '{part.name}', which is not in the graph (any more)")
    return Output(parts[0].name) if len(parts) == 1 else Edge(parts[0].name, parts[1].name)


def _concrete(spec: Any, point: Point, nodes: dict[str, Node]) -> Any:
    if spec is None:
        return None
    if hasattr(spec, "edge_or_node"):
        return SharedWith(_point(spec.edge_or_node, point, nodes))
    if hasattr(spec, "derived_from"):
        return DerivedFrom(
            sources=tuple(_point(place, point, nodes) for place in spec.derived_from),
            derive=spec.derive_qparams_fn,
            dtype=spec.dtype,
            quant_min=spec.quant_min,
            quant_max=spec.quant_max,
            qscheme=spec.qscheme,
            ch_axis=spec.ch_axis,
        )
    if hasattr(spec, "dtype") and (hasattr(spec, "scale") or hasattr(spec, "observer_or_fake_quant_ctr")):
        return spec
    raise AnnotationError(
        f"the spec of ({point}) at {where(nodes[point.tensor])} is {spec!r}, which is not a quantization spec; "
        "use QuantizationSpec, FixedQParams…, Shared…, DerivedQuantizationSpec, or None for float"
    )


def _unquantizable(nodes: Mapping[str, Node], point: Point, written: Mapping[Node, ObservableWrite]) -> str | None:
    """Why a point cannot be quantized, whatever its spec says; None when it can."""
    node = nodes[point.tensor]
    if node in written and (isinstance(point, Output) or nodes[point.dst] in written[node].consumers):
        return f"written in place by '{written[node].writer.name}'"
    tensor = node_tensor(node)
    if tensor is None:
        return None if "val" not in node.meta and node.op != "get_attr" else "not a single tensor"
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_floating_point():
        return f"a {dtype} tensor, not a float one"
    if tensor.dtype not in QUANTIZABLE:
        return f"a {dtype} tensor; float32, float16 and bfloat16 can be quantized"
    return None
