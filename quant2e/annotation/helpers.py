"""PT2E's helpers for annotating nodes, under its names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation, QuantizationSpecBase


def _annotation(node: Node) -> Any:
    """The annotation of a node, whichever library made it; a new one when there is none."""
    return node.meta.setdefault(ANNOTATION, QuantizationAnnotation())


def annotate_input_qspec_map(node: Node, input_node: Node, qspec: QuantizationSpecBase | None) -> None:
    """Say how ``node`` sees its operand ``input_node``; None leaves that operand float."""
    _annotation(node).input_qspec_map[input_node] = qspec


def annotate_output_qspec(node: Node, qspec: QuantizationSpecBase | None) -> None:
    """Say how the result of ``node`` is quantized."""
    _annotation(node).output_qspec = qspec


def get_module_name_filter(module_name: str) -> Callable[[Node], bool]:
    """A filter for nodes that come from inside the module of that dotted path."""

    def is_inside(node: Node) -> bool:
        stack = node.meta.get("nn_module_stack") or {}
        return any(str(entry[0]).removeprefix("L['self'].") == module_name for entry in stack.values())

    return is_inside


class WrapperModule(nn.Module):
    """A function as a module, so that it can be exported."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.fn(*args, **kwargs)


def model_is_exported(model: torch.nn.Module) -> bool:
    """Whether a module is the graph of an export: an FX graph whose nodes record their values."""
    return isinstance(model, GraphModule) and any("val" in node.meta for node in model.graph.nodes)
