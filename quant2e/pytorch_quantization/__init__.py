"""What scripts written for NVIDIA's pytorch-quantization import: descriptors, `tensor_quant`, calibrators.

In: a tensor, or a `QuantDescriptor`. Out: integers, a magnitude, or a spec that any quantizer's configuration takes.
Each name and its place here: ``docs/coming_from.md``.
"""

from quant2e.pytorch_quantization.calibrators import AmaxMethod, HistogramCalibrator, MaxCalibrator
from quant2e.pytorch_quantization.descriptor import (
    QUANT_DESC_4BIT_LINEAR_WEIGHT_PER_ROW,
    QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW,
    QUANT_DESC_8BIT_PER_TENSOR,
    QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR,
    Amax,
    CalibrationMethod,
    QuantDescriptor,
    descriptor_config,
)
from quant2e.pytorch_quantization.tensor_quant import fake_tensor_quant, tensor_quant
from quant2e.pytorch_quantization.weights import amax_of, quantize_tensor, quantize_weights_in_place

__all__ = [
    "QUANT_DESC_4BIT_LINEAR_WEIGHT_PER_ROW",
    "QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW",
    "QUANT_DESC_8BIT_PER_TENSOR",
    "QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR",
    "Amax",
    "AmaxMethod",
    "CalibrationMethod",
    "HistogramCalibrator",
    "MaxCalibrator",
    "QuantDescriptor",
    "amax_of",
    "descriptor_config",
    "fake_tensor_quant",
    "quantize_tensor",
    "quantize_weights_in_place",
    "tensor_quant",
]
