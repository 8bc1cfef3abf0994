"""Contents of ``.xml`` files: what they take and return, which ops they hold, and which constants are integers.

They are read as XML, and OpenVINO is not needed.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from lowering.openvino.files import weights_path
from quant2e.checksum import WORD
from quant2e.errors import FileFormatError
from quant2e.report.plain_data import plain_data

_BITS = {"boolean": 8, "f64": 64, "i64": 64, "u64": 64, "f32": 32, "i32": 32, "u32": 32, "f16": 16, "bf16": 16,
         "i16": 16, "u16": 16, "i8": 8, "u8": 8, "i4": 4, "u4": 4, "u1": 1}  # fmt: skip
_TORCH = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "boolean": "bool", "i64": "int64",
          "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8", "i4": "int4", "u4": "uint4"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenVINOContents:
    """``version``: of the format. ``inputs``, ``outputs``: as text, "x: float32[1..16, 3, 32, 32]". ``ops``: how often
    which op stands in the graph; ``constants``: bytes by dtype; ``weights``: bytes of the ``.bin``, None where there is
    none. ``metadata``: names and texts that the file has.
    """

    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: dict[str, int]
    constants: dict[str, int]
    weights: int | None
    metadata: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**plain_data(self)}

    def __str__(self) -> str:
        beside = "no .bin beside it" if self.weights is None else f"{self.weights:,} bytes in the .bin beside it"
        lines = [f"version {self.version} of OpenVINO's format, {beside}"]
        lines += [f"takes {one}" for one in self.inputs] + [f"returns {one}" for one in self.outputs]
        lines.append("ops: " + ", ".join(f"{count} × {name}" for name, count in self.ops.items()))
        lines.append("constants: " + ", ".join(f"{size:,} bytes of {name}" for name, size in self.constants.items()))
        return "\n".join([*lines, *(f"{name}: {value}" for name, value in self.metadata.items())])


def openvino_contents(path: Path) -> OpenVINOContents:
    """What an ``.xml`` holds, and how large its ``.bin`` is. Raises `FileFormatError` for what is none, OSError."""
    content = path.read_bytes()
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise FileFormatError(f"{path} declares entities, as no OpenVINO model does: it is not read")
    try:
        net = ET.fromstring(content)  # noqa: S314 - without entities, see above
        if net.tag != "net":
            raise FileFormatError(f"{path} is no OpenVINO model: it is XML whose root is <{net.tag}>")
        return _contents(net, weights_path(path))
    except (ET.ParseError, KeyError, ValueError, AttributeError) as error:
        raise FileFormatError(f"{path} is no OpenVINO model, or is damaged: {error}") from error


def _contents(net: ET.Element, beside: Path) -> OpenVINOContents:
    layers = net.findall("layers/layer")
    kinds = Counter(layer.attrib["type"] for layer in layers)
    constants: Counter[str] = Counter()
    for layer in layers:
        if layer.attrib["type"] == "Const":
            data = layer.find("data")
            assert data is not None, "a constant without data"
            sizes = [int(size) for size in data.attrib["shape"].split(",") if size.strip()]
            kind = data.attrib["element_type"]
            constants[_TORCH.get(kind, kind)] += math.ceil(math.prod(sizes) * _BITS.get(kind, 0) / 8)
    parameters = [_input(layer) for layer in layers if layer.attrib["type"] == "Parameter"]
    outputs = [_port(layer) for layer in layers if layer.attrib["type"] == "Result"]
    return OpenVINOContents(
        version=int(net.attrib["version"]),
        inputs=tuple(parameters),
        outputs=tuple(outputs),
        ops={name: count for name, count in kinds.most_common() if name not in {"Const", "Parameter", "Result"}},
        constants=dict(constants.most_common()),
        weights=beside.stat().st_size if beside.exists() else None,
        metadata={one.tag: one.attrib["value"] for one in net.findall("rt_info//*[@value]") if _said(one)},
    )


def _said(one: ET.Element) -> bool:
    """Metadata that is no checksum."""
    return not one.attrib["value"].startswith((WORD, "quant2e_beside"))


def _input(layer: ET.Element) -> str:
    data = layer.find("data")
    assert data is not None, "a parameter without data"
    sizes = [size.strip() for size in data.attrib["shape"].split(",") if size.strip()]
    kind = data.attrib["element_type"]
    return f"{layer.attrib['name']}: {_TORCH.get(kind, kind)}[{', '.join(sizes)}]"


def _port(layer: ET.Element) -> str:
    port = layer.find("input/port")
    assert port is not None, "a result without a port"
    sizes = ["?" if dim.text == "-1" else str(dim.text) for dim in port.findall("dim")]
    kind = port.attrib["precision"].lower().replace("fp", "f")
    name = layer.attrib["name"].partition("/sink_port_")[0]
    return f"{name}: {_TORCH.get(kind, kind)}[{', '.join(sizes)}]"
