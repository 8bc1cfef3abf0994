"""Weight reads: bytes of weights that the products of a graph read in one call, which is what a decoder waits for.

linear(x, dequantize(w int8 [o, i], 4 bits, scales [o, g]))    o · i · 4 / 8 + o · g · bytes of a scale

A layer with one row reads every weight once and multiplies it once, so that the bytes take the time, and not the
multiplications. Tables are left out: of them a call reads the rows that it looks up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operand
from quant2e.graph.qdq_ops import DEQUANTIZE
from quant2e.report.macs import count_macs


def weight_reads(gm: GraphModule) -> int:
    """Bytes of constants that products read in one call of a float or a Q/DQ graph; a weight counts for each reader.

    Integers count the bits of their range. Scales count 2 bytes where bfloat16 holds them exactly, zero points other
    than 0 the bits of the integers.
    """
    return round(sum(_bits(gm, leaf) for node in gm.graph.nodes if count_macs(node) for leaf in _weights(node)) / 8)


def _weights(node: Node) -> Iterator[Node]:
    """What a product reads of constants: ``get_attr`` nodes, and dequantize nodes of constants."""
    for given in node.all_input_nodes:
        source = given
        while source.op == "call_function" and source.target not in DEQUANTIZE and len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        held = operand(source, "input") if source.target in DEQUANTIZE else source
        if isinstance(held, Node) and held.op == "get_attr":
            yield source


def _bits(gm: GraphModule, leaf: Node) -> float:
    if leaf.op == "get_attr":
        value = tensor_at(gm, leaf)
        return 0.0 if value is None else 8.0 * value.numel() * value.itemsize
    integers, scales, zero_points = (tensor_at(gm, operand(leaf, name)) for name in ("input", "scales", "zero_points"))
    low, high = operand(leaf, "quant_min"), operand(leaf, "quant_max")
    if integers is None:
        return 0.0
    plain = isinstance(low, int) and isinstance(high, int)
    width = float((high - low).bit_length()) if plain else 8.0 * integers.itemsize
    points = 0 if zero_points is None or not bool(zero_points.any()) else zero_points.numel()
    return width * (integers.numel() + points) + _scale_bits(scales)


def _scale_bits(scales: Tensor | None) -> float:
    if scales is None:
        return 0.0
    short = torch.equal(scales.to(torch.bfloat16).to(scales.dtype), scales)
    return (16.0 if short else 8.0 * scales.itemsize) * scales.numel()
