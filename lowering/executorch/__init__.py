"""ExecuTorch: from the Q/DQ graph to a program file for its runtime, with the XNNPACK delegate.

In: a `QuantizedModel`, a converted GraphModule or a float module, or several by name. Out: an `ExecuTorchProgram`, run
on the host and compared with the graph it came from. Nothing of ExecuTorch is imported before `to_executorch` is
called.
"""

from lowering.executorch.lower import to_executorch
from lowering.executorch.program import ExecuTorchProgram, Method

__all__ = ["ExecuTorchProgram", "Method", "to_executorch"]
