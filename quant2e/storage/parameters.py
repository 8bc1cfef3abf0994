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
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operand
from quant2e.report.encodings import scale_values, zero_point_values

_READ_BY = {"scale": (scale_values, "scales"), "zero_point": (zero_point_values, "zero_points")}
"""Parameter → the numbers of its tensor, and the operand of the q/dq ops of channels and groups that holds it."""

_SPARE = 10_000
"""Numbers that a record may hold beyond those that lie in the tensors of its graph."""


def name_buffers(encodings: Mapping[str, Any], gm: GraphModule) -> dict[str, Any]:
    """``encodings``, as `Encodings.as_dict` gives it, with the names of the buffers of ``gm`` that hold their lists."""
    held = {part: _held(gm, part) for part in _READ_BY}
    return _mapped(encodings, lambda part, values: held[part].get(_key(values), values) if len(values) > 1 else values)


def read_buffers(encodings: Mapping[str, Any], gm: GraphModule) -> dict[str, Any]:
    """The inverse of `name_buffers`. Raises `FileFormatError` for a buffer that is not there, or a damaged list.

    A few bytes can name a list of any length, many times over: all lists together are not much longer than the tensors
    of the graph, each of whose numbers may be the parameter of two groups.
    """
    nodes = [node for node in gm.graph.nodes if node.op == "get_attr"]
    tensors = {str(node.target): tensor for node in nodes if (tensor := tensor_at(gm, node)) is not None}
    left = _SPARE + 4 * sum(tensor.numel() for tensor in tensors.values())

    def read(part: str, values: Any) -> list[Any]:
        nonlocal left
        if not isinstance(values, list):
            left -= _length(values, tensors)
        if left < 0:
            raise FileFormatError("its lists of numbers are longer than the tensors they belong to")
        return _read(tensors, part, values)

    return _mapped(encodings, read)


def _mapped(encodings: Any, change: Callable[[str, Any], Any]) -> dict[str, Any]:
    given = encodings.get("groups") if isinstance(encodings, Mapping) else None
    if not isinstance(given, (list, tuple)) or not all(isinstance(group, Mapping) for group in given):
        raise FileFormatError("the encodings in the record are damaged: they are no list of groups")
    groups = [{k: change(k, v) if k in _READ_BY else v for k, v in group.items()} for group in given]
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


def _length(values: Any, tensors: Mapping[str, Tensor]) -> int:
    """How many numbers a list will have that is named, or packed as in format 1."""
    if isinstance(values, str):
        if values not in tensors:
            raise FileFormatError(f"the record names the buffer '{values[:200]}', which the graph does not have")
        return tensors[values].numel()
    count = values.get("count", 0) if isinstance(values, dict) else 0
    if type(count) is not int or count < 0:
        raise FileFormatError("a list of numbers is damaged: it has no count")
    return count


def _read(tensors: Mapping[str, Tensor], part: str, values: Any) -> list[Any]:
    if isinstance(values, list):
        return values
    return list(_READ_BY[part][0](tensors[values])) if isinstance(values, str) else _unpacked(values)


def _unpacked(values: Any) -> list[Any]:
    """A list of format 1: ``{"float32": base64}`` of the little-endian values, or ``{"integer": …, "count": …}``."""
    try:
        if "float32" in values:
            raw = np.frombuffer(base64.b64decode(values["float32"], validate=True), dtype="<f4")
            return [float(str(value)) for value in raw]
        value, count = int(values["integer"]), int(values["count"])
    except (TypeError, KeyError, ValueError, binascii.Error) as error:
        raise FileFormatError(f"a list of numbers is damaged: {error}") from error
    return [value] * count
