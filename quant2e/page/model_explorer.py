"""Model Explorer: a graph, and what is known of each node, as the JSON files that Google's viewer opens.

Formats: ``graph_builder.py`` and ``node_data_builder.py`` of ai-edge-model-explorer 0.1.34. A file of a graph holds
``{"graphs": [{"id", "nodes"}]}``; one of node data, laid over it, ``{id of the graph: {"name", "results"}}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant2e.files import atomic_file

COLOURS: Mapping[str, str] = {
    "static": "#9fd0e4",
    "dynamic": "#d3b9e0",
    "weight-only": "#a9d8b7",
    "float": "#f3c3a5",
    "folded": "#d9dde1",
}
"""Background of a node by its verdict, light enough for black text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplorerNode:
    """One op: ``place`` is the path of its module with dots, ``facts`` are shown when it is selected."""

    name: str
    label: str
    place: str
    inputs: tuple[str, ...]
    facts: Mapping[str, str]
    overlays: Mapping[str, str | float] = field(default_factory=dict)


def write_explorer_graph(path: str | os.PathLike[str], graph: str, nodes: Sequence[ExplorerNode]) -> None:
    """Write a graph of the id ``graph``. Raises OSError when the file cannot be written."""
    written = {"graphs": [{"id": graph, "nodes": [_node(node) for node in nodes]}]}
    _write(Path(path), written)


def write_explorer_overlay(
    path: str | os.PathLike[str], graph: str, overlay: str, nodes: Sequence[ExplorerNode]
) -> None:
    """Write one of the ``overlays`` of ``nodes`` as node data of the graph of the id ``graph``."""
    results = {node.name: _result(node.overlays[overlay]) for node in nodes if overlay in node.overlays}
    _write(Path(path), {graph: {"name": overlay, "results": results}})


def _write(path: Path, data: Any) -> None:
    with atomic_file(path) as part:
        part.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def _node(node: ExplorerNode) -> dict[str, Any]:
    return {
        "id": node.name,
        "label": node.label,
        "namespace": "/".join(node.place.split(".")) if node.place else "",
        "attrs": [{"key": key, "value": value} for key, value in node.facts.items()],
        "incomingEdges": [
            {"sourceNodeId": name, "sourceNodeOutputId": "0", "targetNodeInputId": str(index)}
            for index, name in enumerate(node.inputs)
        ],
    }


def _result(value: str | float) -> dict[str, Any]:
    return {"value": value, **({"bgColor": COLOURS[value]} if isinstance(value, str) and value in COLOURS else {})}
