"""The quantizers of the fuzzer, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from quant2e.annotation.quantizer import Quantizer
from quantizers import ComposableQuantizer, EmbeddingQuantizer, X86InductorQuantizer, XNNPACKQuantizer

SETTINGS: Mapping[str, Callable[[], Quantizer]] = {
    "xnnpack": lambda: XNNPACKQuantizer().set_global("w8a8"),
    "x86": lambda: X86InductorQuantizer().set_global("w8a8"),
    "xnnpack-tensor": lambda: XNNPACKQuantizer().set_global("w8a8-tensor"),
    "xnnpack-dynamic": lambda: XNNPACKQuantizer().set_global("w8a8-dynamic"),
    "x86-dynamic": lambda: X86InductorQuantizer().set_global("w8a8-dynamic"),
    "x86-weights": lambda: X86InductorQuantizer().set_global("w8"),
    "composed": lambda: ComposableQuantizer([EmbeddingQuantizer(), XNNPACKQuantizer().set_global("w8a8")]),
}

TRAINED: Mapping[str, Callable[[], Quantizer]] = {
    "xnnpack": lambda: XNNPACKQuantizer().set_global("w8a8-qat"),
    "x86": lambda: X86InductorQuantizer().set_global("w8a8-qat"),
    "xnnpack-tensor": lambda: XNNPACKQuantizer().set_global("w8a8-tensor-qat"),
}
"""The same for training, where there is such a thing."""
