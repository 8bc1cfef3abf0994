"""Contents of ``.onnx`` files: what they take and return, which ops they hold, and which constants are integers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant2e.checksum import WORD
from quant2e.errors import FileFormatError, LoweringError
from quant2e.report.plain_data import plain_data


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxContents:
    """``opset``: of ONNX's own ops. ``inputs``, ``outputs``: as text, "x: float32[batch, 3, 32, 32]". ``ops``: how
    often which op stands in the graph; ``constants``: bytes by dtype. ``metadata``: names and texts that the file has.
    """

    opset: int
    producer: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: dict[str, int]
    constants: dict[str, int]
    metadata: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**plain_data(self)}

    def __str__(self) -> str:
        lines = [f"opset {self.opset}, written by {self.producer or 'an unnamed program'}"]
        lines += [f"takes {one}" for one in self.inputs] + [f"returns {one}" for one in self.outputs]
        lines.append("ops: " + ", ".join(f"{count} × {name}" for name, count in self.ops.items()))
        lines.append("constants: " + ", ".join(f"{size:,} bytes of {name}" for name, size in self.constants.items()))
        return "\n".join([*lines, *(f"{name}: {value}" for name, value in self.metadata.items())])


def onnx_contents(path: Path) -> OnnxContents:
    """What an ONNX file holds. Tensors that lie in other files are not read.

    Raises `FileFormatError` for what is none, `LoweringError` where onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise LoweringError(f"reading .onnx files needs {error.name}: pip install quant2e[onnx]") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # of protobuf, whose errors have no common base
        raise FileFormatError(f"{path} is no ONNX file, or is damaged: {error}") from error
    constants: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        name = _dtype_name(onnx, tensor.data_type)
        bits = 4 if name.endswith("int4") else 8 * _width(onnx, tensor.data_type)
        constants[name] += math.prod(tensor.dims) * bits // 8
    own = [one.version for one in model.opset_import if one.domain in {"", "ai.onnx"}]
    return OnnxContents(
        opset=max(own, default=0),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=tuple(_shown(onnx, one) for one in model.graph.input),
        outputs=tuple(_shown(onnx, one) for one in model.graph.output),
        ops=dict(Counter(node.op_type for node in model.graph.node).most_common()),
        constants=dict(constants.most_common()),
        metadata={entry.key: entry.value for entry in model.metadata_props if entry.key != WORD},
    )


def _width(onnx: Any, dtype: int) -> int:
    """Bytes of a number; 0 for what is none."""
    try:
        return int(onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize)
    except (KeyError, TypeError, ValueError):
        return 0


def _shown(onnx: Any, one: Any) -> str:
    kind = one.type.tensor_type
    sizes = [str(size.dim_value) if size.HasField("dim_value") else size.dim_param or "?" for size in kind.shape.dim]
    return f"{one.name}: {_dtype_name(onnx, kind.elem_type)}[{', '.join(sizes)}]"


def _dtype_name(onnx: Any, number: int) -> str:
    """A dtype as torch calls it."""
    names = onnx.TensorProto.DataType
    name = names.Name(number).lower() if number in names.values() else f"dtype {number}"
    return {"float": "float32", "double": "float64"}.get(name, name)
