"""ONNX: files with QuantizeLinear and DequantizeLinear, for onnxruntime and TensorRT.

In: a `QuantizedModel` or a converted GraphModule. Out: a file and an `OnnxProgram` that runs it. ``form``: the graph in
the form that runtimes recognise; ``translation``: its ops in ONNX; ``integers``: what torch has no dtype for;
``lower``: the way.
"""

from lowering.onnx.lower import to_onnx
from lowering.onnx.program import OnnxProgram, OnnxReport

__all__ = ["OnnxProgram", "OnnxReport", "to_onnx"]
