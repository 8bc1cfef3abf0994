"""XNNPACK, the CPU delegate of ExecuTorch: signed 8-bit activations, symmetric weights of 8 or 4 bits."""

from quantizers.xnnpack.config import get_symmetric_quantization_config
from quantizers.xnnpack.quantizer import XNNPACKQuantizer

__all__ = ["XNNPACKQuantizer", "get_symmetric_quantization_config"]
