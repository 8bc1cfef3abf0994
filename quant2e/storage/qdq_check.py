"""Parameters of quantize and dequantize ops in a file: what convert never writes, a damaged or edited file may hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from quant2e.annotation.parameter_rules import PARAMETER_RULES
from quant2e.annotation.specs import INTEGER_BOUNDS
from quant2e.errors import FileFormatError, where
from quant2e.graph.dataflow import operand
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE


def check_parameters(gm: GraphModule) -> None:
    """Raise `FileFormatError`, naming an op, when a scale, zero point or range cannot be one."""
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        for node in module.graph.nodes:
            quantizes = node.target in QUANTIZE or node.target in DEQUANTIZE
            if quantizes and (wrong := next(_wrong(node), None)) is not None:
                raise FileFormatError(f"it holds parameters that no quantization has: {where(node)}: {wrong}")


def _wrong(node: Node) -> Iterator[str]:
    """What is wrong with the parameters of one op."""
    yield from (found for _, rule in PARAMETER_RULES if (found := rule(node)) is not None)
    zero_point, dtype = operand(node, "zero_point"), operand(node, "dtype")
    bounds = INTEGER_BOUNDS.get(dtype) if isinstance(dtype, torch.dtype) else None
    if bounds is not None and isinstance(zero_point, (int, float)) and not bounds[0] <= zero_point <= bounds[1]:
        yield f"its zero point {zero_point} is no {dtype}"
    low, high = operand(node, "quant_min"), operand(node, "quant_max")
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
        yield f"its range [{low}, {high}] is empty"
