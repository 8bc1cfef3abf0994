"""Parameters of channels and groups in a file's record: the graph holds them, so the record names its buffers.

    {"scale": [0.5, 0.25, …]}   <=>   {"scale": "weight_scale"}  where  graph.weight_scale = [0.5, 0.25, …]

A table of a model may have a scale for each of 30,000 rows. A list that is in no buffer of the graph stays a list.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.documents.tensor_numbers import TensorNumbers, plain_numbers, tensor_of
from quant2e.errors import FileFormatError
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operand

_READ_BY = {"scale": "scales", "zero_point": "zero_points"}
"""Parameter → the operand of the q/dq ops of channels and groups that holds it."""

_SPARE = 10_000
"""Numbers that a record may hold beyond those that lie in the tensors of its graph."""


def name_buffers(encodings: Mapping[str, Any], gm: GraphModule) -> dict[str, Any]:
    """``encodings``, as `encodings_record` gives it, with the names of the buffers of ``gm`` that hold their lists.

    A list that no buffer holds is one of Python's numbers.
    """
    held = {part: _Holders(gm, operand_name) for part, operand_name in _READ_BY.items()}

    def named(part: str, values: Any) -> Any:
        return (held[part].path_of(values) if len(values) > 1 else None) or plain_numbers(values)

    return _mapped(encodings, named)


def read_buffers(encodings: Mapping[str, Any], gm: GraphModule) -> dict[str, Any]:
    """The inverse of `name_buffers`. Raises `FileFormatError` for a buffer that is not there, or a damaged list.

    A few bytes can name a list of any length, many times over: all lists together are not much longer than the tensors
    of the graph, each of whose numbers may be the parameter of two groups.
    """
    nodes = [node for node in gm.graph.nodes if node.op == "get_attr"]
    tensors = {str(node.target): tensor for node in nodes if (tensor := tensor_at(gm, node)) is not None}
    left = _SPARE + 4 * sum(tensor.numel() for tensor in tensors.values())

    def read(_part: str, values: Any) -> Sequence[float]:
        nonlocal left
        if not isinstance(values, list):
            left -= _length(values, tensors)
        if left < 0:
            raise FileFormatError("its lists of numbers are longer than the tensors they belong to")
        return _read(tensors, values)

    return _mapped(encodings, read)


def _mapped(encodings: Any, change: Callable[[str, Any], Any]) -> dict[str, Any]:
    given = encodings.get("groups") if isinstance(encodings, Mapping) else None
    if not isinstance(given, (list, tuple)) or not all(isinstance(group, Mapping) for group in given):
        raise FileFormatError("the encodings in the record are damaged: they are no list of groups")
    groups = [{k: change(k, v) if k in _READ_BY else v for k, v in group.items()} for group in given]
    return {**encodings, "groups": groups}


class _Holders:
    """The buffers that hold one parameter of q/dq ops, found by the tensor itself or else by its numbers."""

    def __init__(self, gm: GraphModule, name: str) -> None:
        holders = {str(ref.target): ref for node in gm.graph.nodes if isinstance(ref := operand(node, name), Node)}
        self._tensors = {path: value for path, ref in holders.items() if (value := tensor_at(gm, ref)) is not None}
        self._paths = {id(value): path for path, value in self._tensors.items()}
        self._by_numbers: dict[Any, str] | None = None

    def path_of(self, values: Sequence[float]) -> str | None:
        """Where a list is held; None where it is not."""
        numbers = values if isinstance(values, TensorNumbers) else _as_tensor(values)
        if numbers is None:
            return None
        if (found := self._paths.get(id(numbers.tensor))) is not None:
            return found
        if self._by_numbers is None:
            self._by_numbers = {_key(TensorNumbers(value)): path for path, value in self._tensors.items()}
        return self._by_numbers.get(_key(numbers))


def _as_tensor(values: Sequence[float]) -> TensorNumbers | None:
    """Python's numbers as those of a tensor, where they are what such a tensor gives back; None where they are not.

    Zero points may be floats, which equal integers and are none.
    """
    flat = tensor_of(values)
    made = TensorNumbers(flat.float() if flat.is_floating_point() else flat)
    return made if made == tuple(values) and type(made[0]) is type(values[0]) else None


def _key(numbers: TensorNumbers) -> tuple[int, bool, bytes]:
    """What two lists have in common that are equal, in few bytes."""
    flat = numbers.flat()
    plain = flat if flat.is_floating_point() else flat.to(torch.int64)
    return len(numbers), flat.is_floating_point(), hashlib.sha256(plain.contiguous().numpy().data).digest()


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


def _read(tensors: Mapping[str, Tensor], values: Any) -> Sequence[float]:
    if isinstance(values, list):
        return values
    return TensorNumbers(tensors[values]) if isinstance(values, str) else _unpacked(values)


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
