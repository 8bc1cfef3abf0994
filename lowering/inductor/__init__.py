"""Inductor: a Q/DQ graph becomes a compiled callable, or a package that runs without this library.

In: a `QuantizedModel` or a converted GraphModule. Out: an `InductorProgram` or an `InductorPackage`, run on the host
and compared with the graph it came from. Nothing of Inductor is imported before one of the functions is called.
"""

from lowering.inductor.package import InductorPackage, package_inductor
from lowering.inductor.program import InductorProgram, to_inductor
from lowering.inductor.report import InductorReport, LoweredOp

__all__ = ["InductorPackage", "InductorProgram", "InductorReport", "LoweredOp", "package_inductor", "to_inductor"]
