"""The ExecuTorch runtime of this process: whether it is there, what it can run, and loading with verified structure."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from lowering.executorch.pte import check_structure
from lowering.signature import TensorInput
from quant2e.errors import FileFormatError, LoweringError
from quant2e.isolation import quietly, tracing, unheard
from quant2e.versions import warn_of_untested_executorch

DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}
"""Numbers of dtypes in ExecuTorch's files, those of torch's ScalarType."""


def require_executorch(*, runtime_only: bool = False) -> None:
    """Import ExecuTorch with its quantized kernels; raise `LoweringError` when it is not installed.

    ``runtime_only``: without the compiler, which takes seconds to import.
    """
    wanted = ["executorch.kernels.quantized", "executorch.runtime", *([] if runtime_only else ["executorch.exir"])]
    if all(name in sys.modules for name in wanted):
        return
    try:
        with unheard("importing ExecuTorch"):  # torchao, which it imports, says what it misses
            for name in wanted:
                importlib.import_module(name)
    except ImportError as error:
        raise LoweringError(f"ExecuTorch is not installed ({error}): pip install quant2e[executorch]") from error
    warn_of_untested_executorch()


def load_program(content: bytes) -> Any:
    """A program from its bytes, which it keeps alive. Raises `FileFormatError` when they are damaged.

    The runtime interprets the program: a delegate's blob and a list of kernels to call. No code of the file is run.
    """
    check_structure(content, "this program")
    with tracing(), quietly():
        require_executorch(runtime_only=True)
        from executorch.runtime import Runtime, Verification

        try:
            with unheard("loading a program of ExecuTorch"):
                return Runtime.get().load_program(content, verification=Verification.InternalConsistency)
        except RuntimeError as error:
            raise FileFormatError(f"the ExecuTorch runtime cannot read this program: {error}") from error


def load_method(program: Any, name: str) -> Any:
    """A method of a loaded program, ready to run. Raises `LoweringError`, with the backends that are missing here."""
    with tracing(), quietly():
        try:
            with unheard("loading a method of ExecuTorch"):
                return program.load_method(name)
        except RuntimeError as error:
            raise LoweringError(f"the ExecuTorch runtime cannot load the method '{name}': {error}") from error


def check_program(program: Any) -> None:
    """Raise `LoweringError` for what the runtime of this process lacks: kernels of ops, and backends of delegates."""
    from executorch.runtime import Runtime

    runtime = Runtime.get()
    wanted = {
        f"{op.name}.{op.overload}" if op.overload else op.name
        for plan in program.execution_plan
        for op in plan.operators
    }
    missing = sorted(wanted - runtime.operator_registry.operator_names)
    if missing:
        raise LoweringError(
            f"the ExecuTorch runtime has no kernel for {', '.join(missing)}: leave the ops around them in float, or "
            f"give the partitioner of a backend that takes them"
        )


def unavailable_backends(program: Any) -> list[str]:
    """Backends that delegates of a program need and that do not work in this process."""
    from executorch.runtime import Runtime

    registry = Runtime.get().backend_registry
    wanted = {delegate.id for plan in program.execution_plan for delegate in plan.delegates}
    return sorted(name for name in wanted if not registry.is_available(name))


def set_threads(count: int) -> None:
    """How many threads programs that are loaded from now on use. Programs loaded before must not be run any more."""
    require_executorch(runtime_only=True)
    from executorch.extension.pybindings import portable_lib

    with unheard("making ExecuTorch's threads"):
        portable_lib._unsafe_reset_threadpool(count)


def input_tensors(program: Any, method: str) -> tuple[TensorInput, ...]:
    """What a method of a loaded program takes. The file holds the largest size of a dynamic dimension only."""
    meta = program.metadata(method)
    try:
        infos = [meta.input_tensor_meta(index) for index in range(meta.num_inputs())]
    except RuntimeError as error:
        raise LoweringError(f"the method '{method}' takes something that is not a tensor: {error}") from error
    if unknown := sorted({info.dtype() for info in infos} - set(DTYPES)):
        raise LoweringError(f"the method '{method}' takes tensors of dtype number {unknown}, which torch here lacks")
    return tuple(
        TensorInput(
            name=f"input {index}",
            dtype=DTYPES[info.dtype()],
            sizes=tuple((0, size) for size in info.sizes()),
        )
        for index, info in enumerate(infos)
    )
