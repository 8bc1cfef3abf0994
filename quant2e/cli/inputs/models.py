"""Models as captured graphs: float ``.pt2`` files, what ``module:function`` returns, and quantized ``.pt2`` files.

A file is read by `quant2e.load`, which runs nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from quant2e.cli.inputs.arguments import is_code
from quant2e.cli.inputs.user_code import user_function
from quant2e.errors import FileFormatError, Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import capture_call
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE
from quant2e.quantized_model import QuantizedModel, load
from quant2e.storage.inductor_package import is_package

_RETURNS = (
    "return (model, example_inputs), or (model, example_inputs, dynamic_shapes) as torch.export.export takes them"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceModel:
    """A float model. ``name``: as the user wrote it. ``stand_ins``: its file does not hold the example inputs."""

    name: str
    graph: GraphModule
    example: Call
    dynamic_shapes: Any
    stand_ins: bool = False


def read_float_model(source: str, dynamic_batch: int | None = None) -> SourceModel:
    """The float model of a ``.pt2`` file, or of ``module:function``; ``dynamic_batch``: so many samples at most.

    Raises `FileFormatError` for a file that is no exported program or is quantized already, `CaptureError` for a model
    that cannot be captured, and `Quant2eError` where the function fails or returns something else.
    """
    if is_code(source):
        model, example, shapes = _of_function(source)
        captured, call, shapes = capture_call(model, example, None, shapes, dynamic_batch or False)
        return SourceModel(name=source, graph=captured, example=call, dynamic_shapes=shapes)
    loaded = read_program_file(Path(source))
    if is_quantized(loaded.module):
        raise FileFormatError(f"{source} is quantized already: give the float model that it was made from")
    if not loaded.example_inputs and not loaded.example_kwargs:
        raise FileFormatError(f"{source} holds no example inputs: export the model anew, with torch.export.export")
    if dynamic_batch is not None:
        raise Quant2eError(
            f"--dynamic-batch is for models of module:function: {source} is exported, with the sizes that it has. "
            "Export it with dynamic_shapes="
        )
    call = Call(loaded.example_inputs, dict(loaded.example_kwargs))
    shapes = loaded.dynamic_shapes
    return SourceModel(
        name=source, graph=loaded.module, example=call, dynamic_shapes=shapes, stand_ins=loaded.stand_ins
    )


def read_quantized_model(path: Path) -> QuantizedModel:
    """What `quant2e.save` wrote. Raises `FileFormatError` for anything else."""
    loaded = read_program_file(path)
    if not is_quantized(loaded.module):
        raise FileFormatError(f"{path} is a float model: quantize it first, with quant2e quantize")
    return loaded


def read_program_file(path: Path) -> QuantizedModel:
    """The exported program of a ``.pt2`` file, quantized or not. Raises `FileFormatError` for another kind of file."""
    if is_package(path):
        raise FileFormatError(
            f"{path} is a package of AOTInductor, which is native code: give the model that it was made from"
        )
    return load(path)


def is_quantized(graph: GraphModule) -> bool:
    """Whether a graph quantizes or dequantizes anything."""
    parts = [part for part in graph.modules() if isinstance(part, GraphModule)]
    return any(node.target in QUANTIZE | DEQUANTIZE for part in parts for node in part.graph.nodes)


def _of_function(place: str) -> tuple[Any, Any, Any]:
    """Model, example inputs and dynamic shapes that the user's function returns."""
    returned = user_function(place)()
    if isinstance(returned, nn.Module) or not isinstance(returned, tuple) or len(returned) not in (2, 3):
        what = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
        raise Quant2eError(f"{place} returned {what}: {_RETURNS}")
    model, example, *shapes = returned
    if not isinstance(model, nn.Module | ExportedProgram):
        raise Quant2eError(f"{place} returned a {type(model).__name__} as the model: {_RETURNS}")
    if isinstance(model, nn.Module) and not isinstance(model, GraphModule):
        model = model.eval()
    if not isinstance(example, Tensor | tuple | list | dict):
        raise Quant2eError(f"{place} returned a {type(example).__name__} as the example inputs: {_RETURNS}")
    return model, example, shapes[0] if shapes else None
