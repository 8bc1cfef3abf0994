"""OpenVINO on the CPU, with the options under which it computes what a model says."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowering.signature import TensorInput
from quant2e.errors import FileFormatError, LoweringError
from quant2e.isolation import tracing

_LARGEST = 1 << 62

_DTYPES = {
    "boolean": torch.bool,
    "u8": torch.uint8,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "f16": torch.float16,
    "f32": torch.float32,
    "f64": torch.float64,
}

RUN_TIME_OPTIONS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Options that a file carries itself, so that they hold wherever it is compiled. On processors with VNNI, OpenVINO
quantizes the activations before compressed weights otherwise, which no graph of ours says."""


def compile_options() -> dict[str, Any]:
    """Options of ``compile_model`` under which OpenVINO computes what a model says, on as many threads as torch uses.

    Float ops compute in float32: on processors with bfloat16 or AMX they would not.
    """
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        **RUN_TIME_OPTIONS,
    }


def import_openvino() -> Any:
    """The package. Raises `LoweringError` that says how to install it."""
    try:
        with tracing():
            import openvino
    except ImportError as error:
        raise LoweringError(f"OpenVINO is not installed ({error}): pip install quant2e[openvino]") from error
    return openvino


def read_model(xml: bytes, weights: bytes, name: str) -> Any:
    """An ``openvino.Model`` from the bytes of its two files, or of an ONNX file. ``name``: of the file, in errors.

    Raises `FileFormatError` for bytes that are no model.
    """
    openvino = import_openvino()
    core = openvino.Core()
    try:
        return core.read_model(xml, weights) if weights else core.read_model(xml)
    except Exception as error:
        raise FileFormatError(f"{name} is no model that OpenVINO reads, or is damaged: {_first_line(error)}") from error


class Session:
    """A model, compiled for the CPU. Calls from several threads wait for each other.

    Raises `LoweringError` for a model that OpenVINO cannot compile here.
    """

    def __init__(self, model: Any, name: str) -> None:
        openvino = import_openvino()
        self.inputs = tensors_taken(model)
        try:
            self.compiled = openvino.Core().compile_model(model, "CPU", compile_options())
            self._request = self.compiled.create_infer_request()
        except Exception as error:
            raise LoweringError(f"OpenVINO cannot compile {name}: {_first_line(error)}") from error
        self._turn = threading.Lock()

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Outputs, for tensors in the order of the inputs. Raises `LoweringError`."""
        try:
            arrays = [tensor.detach().contiguous().numpy() for tensor in tensors]
            with self._turn:
                results = self._request.infer(arrays, share_inputs=True)
                return [torch.from_numpy(results[place]) for place in range(len(self.compiled.outputs))]
        except Exception as error:
            raise LoweringError(
                f"OpenVINO refused the inputs, or could not run on them: {_first_line(error)}"
            ) from error


def open_model(xml: bytes, weights: bytes, path: Path) -> Session:
    """A session for the two files at ``path``. Raises `FileFormatError` for what is no model, `LoweringError` for one
    that cannot be run here.
    """
    return Session(read_model(xml, weights, str(path)), str(path))


def tensors_taken(model: Any) -> tuple[TensorInput, ...]:
    """What a model takes. Raises `LoweringError` for inputs that are no tensors of the usual dtypes."""
    found = []
    for one in model.inputs:
        name, kind, shape = one.get_any_name(), str(one.element_type.get_type_name()), one.partial_shape
        if kind not in _DTYPES or shape.rank.is_dynamic:
            raise LoweringError(f"input '{name}' of the model is {kind}{shape}, which cannot be passed from here")
        found.append(TensorInput(name=name, dtype=_DTYPES[kind], sizes=tuple(map(_bounds, shape))))
    return tuple(found)


def _bounds(size: Any) -> tuple[int, int]:
    low, high = int(size.get_min_length()), int(size.get_max_length())
    return low, high if high >= 0 else _LARGEST


def _first_line(error: Exception) -> str:
    """What OpenVINO says, without where in its sources it says so."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return (said or lines or [type(error).__name__])[0]
