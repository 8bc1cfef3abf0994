"""Ladder: what ``algorithms="auto"`` tries, in this order, and what it does not try where it cannot help.

Scales move first, between layers and from activations into weights, while the graph is float; where that does not
suffice, divisions are put in for them; then weights find their ranges and their rounding, and where that does not
suffice, another one, guided by the output; biases come last, since they make up for what is left, on average or, which
takes longest, as the output asks for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.driver import Attempt
from quant2e.accuracy.algorithms.registry import AlgorithmItem, Algorithms, read_algorithms
from quant2e.errors import Quant2eError
from quant2e.graph.constants import Constants
from quant2e.graph.control_flow import graphs_of
from quant2e.graph.fake_values import node_tensor
from quant2e.observers.base import is_observer_call
from quant2e.passes.fold_batch_norm import NORMALIZED
from quant2e.report.record import record_of
from quant2e.report.report import DYNAMIC, STATIC

ENOUGH_DB = 30.0
"""SQNR of the output, in dB, from which on nothing more is tried: a thousandth of its power is noise."""


def without_integer_activations(prepared: GraphModule) -> str:
    """A reason where no op computes on quantized activations."""
    kinds = {verdict.kind for verdict in record_of(prepared).report.verdicts}
    return "" if kinds & {STATIC, DYNAMIC} else "no activation is quantized"


def without_static_activations(prepared: GraphModule) -> str:
    """A reason where no op computes on activations whose ranges are known beforehand."""
    static = any(verdict.kind == STATIC for verdict in record_of(prepared).report.verdicts)
    return "" if static else "no activation has a range that was calibrated"


def without_linears(prepared: GraphModule) -> str:
    """A reason where no linear computes on quantized activations: divisions are put in front of those."""
    targets = {node.target for _, graph in graphs_of(prepared) for node in graph.graph.nodes}
    no_linear = "" if torch.ops.aten.linear.default in targets else "there is no linear to put a division in front of"
    return without_integer_activations(prepared) or no_linear


def with_integer_activations(prepared: GraphModule) -> str:
    """A reason where ops compute on quantized activations."""
    return "" if without_integer_activations(prepared) else "it is for weights alone, and activations are quantized"


def without_weights(prepared: GraphModule) -> str:
    """A reason where no weight is quantized."""
    return "" if any(_has_weights(graph) for _, graph in graphs_of(prepared)) else "no weight is quantized"


def without_norms(prepared: GraphModule) -> str:
    """A reason where no batch norm was folded."""
    nodes = (node for _, graph in graphs_of(prepared) for node in graph.graph.nodes)
    return "" if any(NORMALIZED in node.meta for node in nodes) else "no batch norm was folded"


LADDER: tuple[tuple[AlgorithmItem, Callable[[GraphModule], str]], ...] = (
    ("equalize", without_integer_activations),
    ("smooth", without_integer_activations),
    ("smooth_sums", without_integer_activations),
    ({"smooth": {"insert": True}}, without_linears),
    ("awq", with_integer_activations),
    ("fit_activation_ranges", without_static_activations),
    ("fit_weight_ranges", without_weights),
    ("gptq", without_weights),
    ({"gptq": {"guided": True}}, without_weights),
    ("correct_bias", without_weights),
    ("reestimate_batch_norm", without_norms),
    ("learn_biases", without_weights),
)
"""Algorithms in the order in which they are tried, and on which graphs they are not: a new one is one line."""


def attempts_of(asked: Algorithms) -> tuple[Attempt, ...]:
    """What is to be tried, for ``algorithms=`` of `quant2e.quantize`. Raises as `read_algorithms` does."""
    if asked == "auto":
        asked_of, reasons = zip(*LADDER, strict=True)
        return tuple(map(Attempt, read_algorithms(asked_of), reasons))
    if isinstance(asked, str):
        raise Quant2eError(f'algorithms="{asked}": give a list, ["{asked}"], or "auto" for the default ladder')
    return tuple(map(Attempt, read_algorithms(asked)))


def _has_weights(graph: GraphModule) -> bool:
    """Whether a constant of two dimensions or more, which a bias has not, is observed."""
    constants = Constants(graph.graph)
    sources = (node.all_input_nodes[0] for node in graph.graph.nodes if is_observer_call(node))
    return any(x in constants and (value := node_tensor(x)) is not None and value.dim() > 1 for x in sources)
