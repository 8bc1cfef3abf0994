"""Annotations as text: what a quantizer decided, one line per annotated node."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.annotation.granularity import granularity_text
from quant2e.annotation.specs import ANNOTATION, dynamic_granularity_of, group_size_of
from quant2e.graph.printer import dtype_text


def annotations_text(gm: GraphModule) -> str:
    """``node: operand spec, … -> spec of the result  [rule]``; operands without a spec are left out."""
    lines = []
    for node in gm.graph.nodes:
        note = node.meta.get(ANNOTATION)
        if note is None:
            continue
        inputs = [f"{src.name} {_text(spec)}" for src, spec in note.input_qspec_map.items()]
        result = f" -> {_text(note.output_qspec)}" if note.output_qspec is not None else ""
        rule = getattr(note, "rule", "")
        lines.append(f"{node.name}: {', '.join(inputs)}{result}{f'  [{rule}]' if rule else ''}".replace(":  ", ": "))
    return "\n".join(lines)


def _text(spec: Any) -> str:
    if spec is None:
        return "float"
    if (place := getattr(spec, "edge_or_node", None)) is not None:
        return f"= {place.name}" if isinstance(place, Node) else f"= {place[0].name}>{place[1].name}"
    bounds = "" if spec.quant_min is None else f"[{spec.quant_min},{spec.quant_max}]"
    scheme = {
        torch.per_tensor_affine: "",
        torch.per_tensor_symmetric: " symmetric",
        torch.per_channel_symmetric: f" symmetric axis {getattr(spec, 'ch_axis', None)}",
        torch.per_channel_affine: f" axis {getattr(spec, 'ch_axis', None)}",
    }.get(spec.qscheme, "")
    if hasattr(spec, "derived_from"):
        scheme += " derived"
    if (group_size := group_size_of(spec)) is not None:
        scheme += f" groups of {group_size}"
    if spec.is_dynamic:
        scheme += " dynamic" + granularity_text(dynamic_granularity_of(spec))
    return dtype_text(spec.dtype) + bounds + scheme
