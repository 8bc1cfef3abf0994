"""Value sources: whether a tensor comes from data, parameters, literals, or integer and boolean inputs.

A float tensor that is computed from integers, booleans and literals only is *mask or position arithmetic*
(``(1 - mask) * finfo.min``): its values are codes, not samples of a distribution, and must stay exact. A tensor that
holds masking values (-inf, -1e9) has no useful range either, whatever else is in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from quant2e.annotation.pattern import short_name
from quant2e.graph.attributes import tensor_at
from quant2e.graph.data_movement import MOVEMENTS
from quant2e.graph.effects import is_random
from quant2e.graph.fake_values import is_float
from quant2e.passes.fold_weights import is_quantize

MASK_VALUE = 1e4
"""Magnitude from which a literal or a buffer value stands for "never": BERT's old masks used -10000."""


class Source(IntEnum):
    """What a tensor is computed from."""

    LITERAL = 0
    """Literals and buffers."""
    PARAMETER = 1
    """Parameters, possibly with literals."""
    INDEX = 2
    """Integer and boolean inputs, possibly with literals."""
    DATA = 3
    """Float inputs, or parameters picked by an index."""


_PICKS = frozenset({"embedding", "embedding_bag", "index", "index_select", "gather", "take_along_dim", "linear"})
"""Ops that turn integer input into data, because they read a table with it."""

_MASKING = frozenset({"full", "full_like", "new_full", "scalar_tensor", "masked_fill", "fill", "where", "mul"})
"""Ops whose literal may be a masking value."""

_KEEPS_SENTINELS = frozenset(
    {"add", "sub", "mul", "div", "neg", "where", "masked_fill", "maximum", "minimum", "getitem"}
) | {short_name(target) for target in MOVEMENTS}
"""Ops whose result holds the masking values of its operands: sums, choices, and what only moves values."""


@dataclass(slots=True)
class ValueSources:
    """The source of every tensor of a graph, and which tensors hold masking values. One walk over the graph."""

    gm: GraphModule
    source: dict[Node, Source] = field(init=False, default_factory=dict)
    masking: dict[Node, Node] = field(init=False, default_factory=dict)
    """Node → the node that brought the masking value in."""

    def __post_init__(self) -> None:
        for node in self.gm.graph.nodes:
            self.source[node] = self._source(node)
            if (origin := self._masking(node)) is not None:
                self.masking[node] = origin

    def objection(self, node: Node) -> str | None:
        """Why the tensor of ``node`` must not be quantized as an activation; None if nothing speaks against it."""
        if self.source[node] is Source.INDEX:
            return "mask or position arithmetic, computed from integer and boolean inputs only"
        if node in self.masking:
            return f"a tensor with the masking value that '{self.masking[node].name}' brings in"
        return None

    def _source(self, node: Node) -> Source:
        carries_values = is_float(node) or _is_complex(node) or is_quantize(node)
        if node.op == "placeholder":
            return Source.DATA if carries_values else Source.INDEX
        if node.op == "get_attr":
            value = tensor_at(self.gm, node)
            return Source.PARAMETER if isinstance(value, nn.Parameter) else Source.LITERAL
        if is_random(node):
            return Source.DATA
        inputs = {self.source[n] for n in node.all_input_nodes if _holds_tensor(n)}
        if not carries_values:
            return Source.INDEX if inputs & {Source.DATA, Source.INDEX} else Source.LITERAL
        reads_table = Source.INDEX in inputs and (Source.PARAMETER in inputs or short_name(node.target) in _PICKS)
        return Source.DATA if reads_table else max(inputs, default=Source.LITERAL)

    def _masking(self, node: Node) -> Node | None:
        if node.op == "get_attr":
            value = tensor_at(self.gm, node)
            if value is None or isinstance(value, nn.Parameter) or value.is_meta:
                return None
            return node if _has_sentinel(value) else None
        if node.op != "call_function" or not is_float(node):
            return None
        name = short_name(node.target).removesuffix("_")
        if name in _MASKING and any(_is_sentinel(a) for a in (*node.args, *node.kwargs.values())):
            scales_data = name == "mul" and self.source[node] is Source.DATA
            return None if scales_data else node
        if name not in _KEEPS_SENTINELS:
            return None
        return next((self.masking[n] for n in node.all_input_nodes if n in self.masking), None)


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    items = value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(item, Tensor) and item.is_complex() for item in items)


def _holds_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    return node.op == "get_attr" or isinstance(value, Tensor | list | tuple)


def _is_sentinel(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) < MASK_VALUE


def _has_sentinel(value: Tensor) -> bool:
    if not value.is_floating_point() or value.numel() == 0:
        return False
    largest = value.detach().abs().amax().item()
    return not math.isfinite(largest) or largest >= MASK_VALUE
