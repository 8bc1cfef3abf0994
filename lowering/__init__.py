"""Lowering: from the portable Q/DQ graph to something that runs: our own kernels, Inductor, ExecuTorch, ONNX, OpenVINO.

In: a `QuantizedModel` or a converted GraphModule. Out: a callable or a program file, checked against the graph it came
from.
"""

from lowering.executorch import ExecuTorchProgram, Method, to_executorch
from lowering.executorch.program import LoadedFile
from lowering.executorch.report import ExecuTorchReport, Leftover, Partition
from lowering.export import Lowerable
from lowering.files import OpenProgram, open_program
from lowering.inductor.kernel_selection import Engines
from lowering.inductor.kernels.engines import KernelChoice, Product
from lowering.inductor.package import InductorPackage, package_inductor
from lowering.inductor.program import InductorProgram, to_inductor
from lowering.inductor.report import InductorReport, LoweredOp
from lowering.inductor.source import InductorSource
from lowering.native.program import NativeOp, NativeProgram, NativeRegion, NativeReport, to_native
from lowering.onnx import OnnxProgram, OnnxReport, to_onnx
from lowering.openvino import OpenVINOProgram, OpenVINOReport, to_openvino
from lowering.openvino.precision import RunOp
from lowering.program import LoweredProgram, LoweringReport, Table
from lowering.signature import ProgramInput, Signature, TensorInput
from lowering.state import KeepsState, State
from lowering.verify import Bound, OutputDifference, Verification, verify
from quant2e.checksum import check_file

__all__ = [
    "Bound",
    "Engines",
    "ExecuTorchProgram",
    "ExecuTorchReport",
    "InductorPackage",
    "InductorProgram",
    "InductorReport",
    "InductorSource",
    "KeepsState",
    "KernelChoice",
    "Leftover",
    "LoadedFile",
    "Lowerable",
    "LoweredOp",
    "LoweredProgram",
    "LoweringReport",
    "Method",
    "NativeOp",
    "NativeProgram",
    "NativeRegion",
    "NativeReport",
    "OnnxProgram",
    "OnnxReport",
    "OpenProgram",
    "OpenVINOProgram",
    "OpenVINOReport",
    "OutputDifference",
    "Partition",
    "Product",
    "ProgramInput",
    "RunOp",
    "Signature",
    "State",
    "Table",
    "TensorInput",
    "Verification",
    "check_file",
    "open_program",
    "package_inductor",
    "to_executorch",
    "to_inductor",
    "to_native",
    "to_onnx",
    "to_openvino",
    "verify",
]
