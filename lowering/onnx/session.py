"""Sessions of onnxruntime on the CPU, with the options under which it computes what a file says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowering.signature import TensorInput
from quant2e.cpu import InstructionSet, detect
from quant2e.errors import FileFormatError, LoweringError
from quant2e.isolation import tracing

_DAMAGED = frozenset({"InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile"})
"""Errors of onnxruntime that a file has to answer for; others are about what can be run."""

_LARGEST = 1 << 62

_DTYPES = {
    "tensor(bool)": torch.bool,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
    "tensor(int16)": torch.int16,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(float16)": torch.float16,
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
}


def exact_options(cpu: InstructionSet) -> dict[str, str]:
    """Session options under which onnxruntime computes on such a processor what a file says.

    ``session.qdq_matmulnbits_accuracy_level``: activations stay float where weights have four bits in blocks.
    ``session.x64quantprecision``: kernels whose 16-bit sums of u8 × s8 products cannot saturate. They are slower, and
    with VNNI, which sums in 32 bits, there is nothing to win by them.
    """
    options = {"session.qdq_matmulnbits_accuracy_level": "1"}
    return {**options, "session.x64quantprecision": "1"} if cpu.saturates else options


def import_onnxruntime() -> Any:
    """onnxruntime, without its telemetry: that would hold three files of the user's cache open, for good.

    A process that imported it before, or that sets ORT_DISABLE_TELEMETRY, has decided itself. Raises ImportError.
    """
    with tracing():
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime
    return onnxruntime


def session(source: bytes | Path, optimized: Path | None = None) -> Any:
    """A session for a model, from its bytes or, with tensors in files beside it, from its path.

    ``optimized``: where to write onnxruntime's graph. Raises `FileFormatError` for what is no model, `LoweringError`
    for one that onnxruntime cannot run here.
    """
    try:
        onnxruntime = import_onnxruntime()
    except ImportError as error:
        raise LoweringError(f"onnxruntime is not installed ({error}): pip install quant2e[onnx]") from error

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    # not the limits of oneDNN: onnxruntime has kernels of its own, and takes what the processor has
    for name, setting in exact_options(detect(environment={})).items():
        options.add_session_config_entry(name, setting)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    given: Any = source if isinstance(source, bytes) else str(source)
    try:
        # no second try with the same provider, which it announces on standard output
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:
        what = f"{source}" if isinstance(source, Path) else "this model"
        kind = FileFormatError if type(error).__name__ in _DAMAGED else LoweringError
        raise kind(f"onnxruntime cannot load {what}: {error}") from error


def run(loaded: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Outputs of a session, for tensors in the order of its inputs. Raises `LoweringError`."""
    names = [given.name for given in loaded.get_inputs()]
    try:
        feeds = {name: tensor.detach().contiguous().numpy() for name, tensor in zip(names, tensors, strict=True)}
        results = loaded.run(None, feeds)
        return [torch.from_numpy(result) for result in results]
    except Exception as error:
        raise LoweringError(f"onnxruntime refused the inputs, or could not run on them: {error}") from error


def tensor_inputs(loaded: Any) -> tuple[TensorInput, ...]:
    """What a session takes. Raises `LoweringError` for inputs that are no tensors of the usual dtypes."""
    return tuple(
        TensorInput(name=one.name, dtype=_dtype(one), sizes=tuple(_size(size) for size in one.shape))
        for one in loaded.get_inputs()
    )


def _dtype(one: Any) -> torch.dtype:
    if one.type not in _DTYPES:
        raise LoweringError(f"input '{one.name}' of the model is a {one.type}, which cannot be passed from here")
    return _DTYPES[one.type]


def _size(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) and size >= 0 else (0, _LARGEST)
