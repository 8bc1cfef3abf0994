"""Native programs: a Q/DQ graph that runs at once, its int8 regions on our own kernels and the rest op by op.

In: a Q/DQ graph. Out: a `NativeProgram` with a `NativeReport`.
"""

from lowering.native.program.program import NativeProgram, to_native
from lowering.native.program.report import NativeOp, NativeRegion, NativeReport

__all__ = ["NativeOp", "NativeProgram", "NativeRegion", "NativeReport", "to_native"]
