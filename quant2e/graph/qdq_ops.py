"""The ops that quantized graphs are written in: ``torch.ops.quantized_decomposed``.

Importing the torch module below registers the ops and does nothing else; it is the one place where this
package touches ``torch.ao``.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed

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
CHOOSE_QPARAMS = frozenset({qd.choose_qparams.tensor, qd.choose_qparams_symmetric.tensor})
