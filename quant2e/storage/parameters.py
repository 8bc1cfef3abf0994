"""Parameters of channels and groups in a file's record: the graph holds them, so the record names its buffers.

    {"scale": [0.5, 0.25, …]}   <=>   {"scale": "weight_scale"}  where  graph.weight_scale = [0.5, 0.25, …]

A table of a model may have a scale for each of 30,000 rows. A list that is in no buffer of the graph stays a list.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.errors import FileFormatError
from quant2e.graph.attributes import attribute, tensor_at
from quant2e.graph.dataflow import operand
from quant2e.report.encodings import scale_values, zero_point_values

_READ_BY = {"scale": (scale_values, "scales"), "zero_point": (zero_point_values, "zero_points")}
"""Parameter → the numbers of its tensor, and the operand of the q/dq ops of channels and groups that holds it."""

_MOST = 1 << 28
"""More parameters than any tensor has channels: a larger count is a damaged file."""


def name_buffers(encodings: Mapping[str, Any], gm: GraphModule) -> dict[str, Any]:
    """``encodings``, as `Encodings.as_dict` gives it, with the names of the buffers of ``gm`` that hold their lists."""
    held = {part: _held(gm, part) for part in _READ_BY}
    return _mapped(encodings, lambda part, values: held[part].get(_key(values), values) if len(values) > 1 else values)


def read_buffers(encodings: Mapping[str, Any], gm: GraphModule) -> dict[str, Any]:
    """The inverse of `name_buffers`. Raises `FileFormatError` for a buffer that is not there, or a damaged list."""
    return _mapped(encodings, lambda part, values: _read(gm, part, values))


def _mapped(encodings: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    groups = [{k: change(k, v) if k in _READ_BY else v for k, v in group.items()} for group in encodings["groups"]]
    return {**encodings, "groups": groups}


def _held(gm: GraphModule, part: str) -> dict[Any, str]:
    """Buffers that hold this parameter of a q/dq op, by their numbers."""
    values, name = _READ_BY[part]
    holders = {str(ref.target): ref for node in gm.graph.nodes if isinstance(ref := operand(node, name), Node)}
    tensors = {path: tensor_at(gm, ref) for path, ref in holders.items()}
    return {_key(values(tensor)): path for path, tensor in tensors.items() if tensor is not None}


def _key(values: tuple[Any, ...]) -> Any:
    """Zero points may be floats, which equal integers and are none."""
    return tuple(values), {type(value) for value in values} == {float}


def _read(gm: GraphModule, part: str, values: Any) -> list[Any]:
    if isinstance(values, list):
        return values
    if isinstance(values, str):
        tensor = attribute(gm, values, None)
        if not isinstance(tensor, Tensor):
            raise FileFormatError(f"the record names the buffer '{values}', which the graph does not have")
        return list(_READ_BY[part][0](tensor))
    return _unpacked(values)


def _unpacked(values: Any) -> list[Any]:
    """A list of format 1: ``{"float32": base64}`` of the little-endian values, or ``{"integer": …, "count": …}``."""
    try:
        if "float32" in values:
            raw = np.frombuffer(base64.b64decode(values["float32"], validate=True), dtype="<f4")
            return [float(str(value)) for value in raw]
        value, count = int(values["integer"]), int(values["count"])
    except (TypeError, KeyError, ValueError, binascii.Error) as error:
        raise FileFormatError(f"a list of numbers is damaged: {error}") from error
    if not 0 <= count <= _MOST:
        raise FileFormatError(f"a list of numbers is damaged: it holds {count}")
    return [value] * count
