"""Buffers that a user wants as integers: what the model writes to them gets the spec, and all of it one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule, Node

from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation, SharedQuantizationSpec
from quant2e.errors import AnnotationError, where
from quant2e.graph.control_flow import BODY
from quant2e.graph.dataflow import operand
from quant2e.graph.mutation import written_attributes
from quant2e.passes.integer_buffers import BUFFERS, WRITTEN, writers
from quantizers.settings.diagnostics import near


def annotate_buffers(gm: GraphModule, specs: Mapping[str, Any]) -> None:
    """Annotate what is written to the buffers that ``specs`` names, and name them in ``gm.meta``.

    Raises `AnnotationError` for a path that the graph writes nothing to, with near misses, and for a buffer that is
    written to in a way that integers do not allow.
    """
    if BODY in gm.meta:
        return
    for path, spec in specs.items():
        found = writers(gm, path)
        if not found and path in written_attributes(gm):
            raise AnnotationError(
                f"the buffer '{path}' cannot hold integers: it is written to through an op that is no plain view"
            )
        if not found:
            known = (str(node.target) for node in gm.graph.nodes if node.op == "get_attr")
            written = [name for name in dict.fromkeys(known) if writers(gm, name)]
            raise AnnotationError(f"this graph writes to no buffer '{path}'{near(path, written)}")
        first: tuple[Node, Node] | None = None
        for node in found:
            value = operand(node, WRITTEN[node.target]) if node.target in WRITTEN else None
            if not isinstance(value, Node):
                raise AnnotationError(
                    f"the buffer '{path}' cannot hold integers: {where(node)} does more than write values as they are"
                )
            wanted = spec if first is None else SharedQuantizationSpec(first)
            node.meta[ANNOTATION] = QuantizationAnnotation({value: wanted}, rule="buffer", _annotated=True)
            first = first or (value, node)
    gm.meta[BUFFERS] = tuple(specs)
