"""Parameters of integer inputs and outputs, published in the program file."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from quant2e.graph.qdq_ops import qd
from quant2e.quantized_io import Port, QuantizedIO

_QUANTIZE, _DEQUANTIZE = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default

_SCALAR_TYPE = {torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3}
"""Numbers of dtypes in the files, those of torch's ScalarType."""


def constants(method: str, quantized_io: QuantizedIO) -> dict[str, float | int]:
    """What a file publishes about integer inputs and outputs: name → value; in ExecuTorch, a method that returns it.

    Named as ExecuTorch's own pass names them, ``forward_input0_scale`` and ``_zp, _quant_min, _quant_max, _dtype``
    beside it, so that an application reads programs of either origin alike.
    """
    found: dict[str, float | int] = {}
    for side, ports in (("input", quantized_io.inputs), ("output", quantized_io.outputs)):
        for port in ports:
            stem = f"{method}_{side}{port.index}_"
            found |= {
                f"{stem}scale": port.scale,
                f"{stem}zp": port.zero_point,
                f"{stem}quant_min": port.quant_min,
                f"{stem}quant_max": port.quant_max,
                f"{stem}dtype": _SCALAR_TYPE[port.dtype],
            }
    return found


def quantized_io_in(module: GraphModule) -> QuantizedIO:
    """The quantized inputs and outputs of a graph, read from its nodes.

    An integer input that something else than one kind of dequantize reads (token ids, say) is not quantized.
    """
    inputs, outputs = [], []
    for index, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder"):
        grids = {tuple(user.args[1:]) for user in node.users if _is(user, _DEQUANTIZE)}
        if len(grids) == 1 and all(_is(user, _DEQUANTIZE) for user in node.users):
            inputs.append(_port(index, node.name, grids.pop()))
    for index, leaf in enumerate(pytree.tree_leaves(module.graph.output_node().args[0])):
        if _is(leaf, _QUANTIZE):
            outputs.append(_port(index, leaf.name, tuple(leaf.args[1:])))
    return QuantizedIO(tuple(inputs), tuple(outputs))


def _port(index: int, name: str, grid: tuple[Any, ...]) -> Port:
    scale, zero_point, low, high, dtype = grid[:5]
    return Port(
        name=name, index=index, scale=scale, zero_point=zero_point, quant_min=low, quant_max=high, dtype=dtype
    )  # fmt: skip


def _is(node: object, target: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target
