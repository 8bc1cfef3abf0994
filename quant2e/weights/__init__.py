"""Weights that stay in their files: models larger than memory are captured and quantized one layer at a time.

In: a model whose parameters are on the meta device, and ``.safetensors`` files. Out: the same model, whose matrices are
read whenever an op needs them.
"""

from quant2e.weights.attach import attach_weights
from quant2e.weights.on_meta import parameters_on_meta

__all__ = ["attach_weights", "parameters_on_meta"]
