"""Output loss: SQNR of a converted graph against the float one it came from, wherever the model has its last float."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.accuracy.compare import compare
from quant2e.accuracy.comparison import Comparison
from quant2e.accuracy.output_error import output_sqnr
from quant2e.convert.convert import converted_graph
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import independent_copy
from quant2e.graph.fake_values import is_float
from quant2e.graph.qdq_ops import qd
from quant2e.integer.report import INTEGER
from quant2e.quantized_io import called_with_floats, quantized_io_of
from quant2e.ranges.blocks import by_blocks
from quant2e.report.record import record_of


def converted_sqnr(
    captured: GraphModule, prepared: GraphModule, converted: GraphModule, calls: Sequence[Call]
) -> tuple[float, str]:
    """SQNR in dB of ``converted`` against ``captured``, and where it was measured unless that is at the outputs.

    ``prepared``: what ``converted`` was made from. A model none of whose outputs is a float (an index, a comparison) is
    measured at its last float tensor; one without any float op has an SQNR of inf.
    """
    if any(is_float(leaf) for leaf in captured.graph.output_node().all_input_nodes):
        candidate = called_with_floats(_frugal(independent_copy(converted)))
        return output_sqnr(independent_copy(captured), candidate, calls), ""
    if not record_of(prepared).report.verdicts:
        return math.inf, ""
    sqnr, place = _last_float(prepared, compare(prepared, in_floats(prepared, converted), calls))
    return sqnr, f"at {place}: no output of the model is a float"


def _frugal(graph: GraphModule) -> GraphModule:
    """``graph``, changed in place: the same bits, with large weights dequantized block by block.

    torch's op for weights with a scale per channel makes 64-bit integers of them first.
    """
    weights = [
        node
        for node in graph.graph.find_nodes(op="call_function", target=qd.dequantize_per_channel.default)
        if node.all_input_nodes[0].op == "get_attr"
    ]
    for node in weights:
        node.target = _dequantized
    if weights:
        graph.recompile()
    return graph


def _dequantized(
    q: Tensor, scales: Tensor, zero_points: Tensor | None, axis: int, *others: Any, out_dtype: torch.dtype | None = None
) -> Tensor:
    """As ``quantized_decomposed.dequantize_per_channel``."""
    compute = partial(qd.dequantize_per_channel.default, out_dtype=out_dtype)
    if zero_points is None:
        zero_points = torch.zeros_like(scales, dtype=torch.int64)
    by_row = axis % q.dim() == 0
    return by_blocks(compute, q, (scales, zero_points), by_row, (axis, *others), out_dtype or torch.float32)


def in_floats(prepared: GraphModule, converted: GraphModule) -> GraphModule:
    """The Q/DQ graph that takes and returns floats: ``converted`` itself unless it computes in integers."""
    return converted_graph(prepared) if INTEGER in converted.meta or quantized_io_of(converted) else converted


def _last_float(prepared: GraphModule, compared: Comparison) -> tuple[float, str]:
    """SQNR in dB of the last tensor that is float, and its name: what an index or a comparison was made of.

    inf where nothing is compared: no op has a float result.
    """
    rows = {row.op: row for row in compared.rows}
    last = next((rows[node.name] for node in reversed(prepared.graph.nodes) if node.name in rows), None)
    return (math.inf, "no op") if last is None else (last.sqnr_db, f"'{last.op}'")
