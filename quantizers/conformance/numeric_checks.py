"""Checks of a converted graph's numbers: scales of biases, results too far from float."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.annotation.pattern import short_name
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operand
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE
from quant2e.isolation import IsolatedRandomness
from quantizers.conformance.isolation_checks import WEIGHTED
from quantizers.conformance.report import Finding


def bias_scales(gm: GraphModule, rules: Mapping[str, str]) -> Iterator[Finding]:
    """Integer biases that are not in units of the accumulator. ``rules``: node name → the rule that annotated it."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or short_name(node.target) not in WEIGHTED:
            continue
        x, w, b = (_scale(gm, operand(node, place)) for place in range(3))
        if x is None or w is None or b is None or not _is_int32(operand(node, 2)):
            continue
        wanted = x * w
        if b.numel() not in (1, wanted.numel()) or not torch.allclose(b.expand_as(wanted), wanted, rtol=1e-4, atol=0):
            told = f"{float(b.flatten()[0]):.4g}, and its accumulator's is {float(wanted.flatten()[0]):.4g}"
            message = f"the scale of its int32 bias is {told} (s_x * s_w)"
            yield Finding("bias scale", message, rules.get(node.name, ""), node.name, str(node.target))


def _scale(gm: GraphModule, node: Any) -> Tensor | None:
    if not isinstance(node, Node) or node.target not in DEQUANTIZE:
        return None
    scale = operand(node, 1)
    if isinstance(scale, Node):
        found = tensor_at(gm, scale)
        return None if found is None else found.double()
    return torch.tensor(scale, dtype=torch.float64) if isinstance(scale, float) else None


def _is_int32(node: Any) -> bool:
    return isinstance(node, Node) and operand(node, "dtype") is torch.int32


FAINT = 0.1
"""Generated models give results near 1. A signal weaker than this (a relu's zeros, say) counts as this strong."""


def sqnr(wanted: Tensor, found: Tensor) -> float:
    """Signal to noise in dB; infinite for equal tensors, -infinite where ``found`` is not finite."""
    signal, noise = wanted.double(), (wanted - found).double()
    if not bool(torch.isfinite(noise).all()):
        return -math.inf
    power = float(noise.square().sum())
    if power == 0:
        return math.inf
    return 10 * math.log10(max(float(signal.square().sum()), FAINT**2 * signal.numel()) / power)


def worst(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, int]:
    """The smallest SQNR of pairs of tensors, and where; integers are left out."""
    pairs = [
        (sqnr(a, b), i)
        for i, (a, b) in enumerate(zip(wanted, found, strict=True))
        if a.is_floating_point() and a.numel()
    ]
    return min(pairs, default=(math.inf, 0))


def suspects(gm: GraphModule, batch: Sequence[Tensor]) -> Node | None:
    """The op of a Q/DQ graph that loses most: the worst SQNR of a quantize op's result against its operand."""
    lost: list[tuple[float, Node]] = []

    class Look(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if n.target in DEQUANTIZE and isinstance(q := operand(n, 0), Node) and q.target in QUANTIZE:
                source = operand(q, 0)
                if isinstance(source, Node) and isinstance(before := self.env[source], Tensor):
                    lost.append((sqnr(before, result), source))
            return result

    with torch.no_grad(), IsolatedRandomness():
        Look(gm, garbage_collect_values=False).run(*batch)
    return min(lost, key=lambda pair: pair[0], default=(0.0, None))[1]
