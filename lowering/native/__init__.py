"""Native int8 regions: connected int8 parts of a Q/DQ graph as one op each, on kernels of our own.

In: a Q/DQ graph. Out: `NativeProgram`, which is ready at once, and the same regions inside of what `to_inductor`
compiles. ``kernels/README.md`` explains the C++.
"""

from lowering.native.program import NativeProgram, to_native
from lowering.native.report import NativeOp, NativeRegion, NativeReport

__all__ = ["NativeOp", "NativeProgram", "NativeRegion", "NativeReport", "to_native"]
