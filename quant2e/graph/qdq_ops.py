"""The ops that quantized graphs are written in: ``torch.ops.quantized_decomposed``.

Importing the torch module below registers the ops and does nothing else; it is the one place where this
package touches ``torch.ao``.
"""

from __future__ import annotations

import operator

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch.fx import Node

qd = torch.ops.quantized_decomposed

QUANTIZE = frozenset(
    {
        qd.quantize_per_tensor.default,
        qd.quantize_per_tensor.tensor,
        qd.quantize_per_tensor.tensor2,
        qd.quantize_per_channel.default,
        qd.quantize_per_channel_group.default,
        qd.quantize_per_token.default,
    }
)
DEQUANTIZE = frozenset(
    {
        qd.dequantize_per_tensor.default,
        qd.dequantize_per_tensor.tensor,
        qd.dequantize_per_tensor.tensor2,
        qd.dequantize_per_channel.default,
        qd.dequantize_per_channel_group.default,
        qd.dequantize_per_token.default,
    }
)
CHOOSE_PER_TENSOR = frozenset({qd.choose_qparams.tensor, qd.choose_qparams_symmetric.tensor})
CHOOSE_PER_TOKEN = frozenset({qd.choose_qparams_per_token.default, qd.choose_qparams_per_token_asymmetric.default})
"""Choose a scale for each line along the last dimension."""

CHOOSE_QPARAMS = CHOOSE_PER_TENSOR | CHOOSE_PER_TOKEN
"""Ops that find scales and zero points at run time."""


def serves_parameters(node: Node) -> bool:
    """Whether a node only lays out what scales are found from at run time, or those scales."""
    if node.users and all(user.target in CHOOSE_QPARAMS or serves_parameters(user) for user in node.users):
        return True
    return bool(node.all_input_nodes) and all(map(_is_parameter, node.all_input_nodes))


def _is_parameter(node: Node) -> bool:
    return node.target is operator.getitem and node.all_input_nodes[0].target in CHOOSE_QPARAMS
