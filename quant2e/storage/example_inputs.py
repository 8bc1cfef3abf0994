"""Example inputs in a file: what they look like, and inputs that look like them; the data itself only when asked for.

    float32[8, 3, 32, 32] from -2.1 to 2.6     =>     noise of that shape within these bounds: a stand-in

A file that is handed on tells nothing of the data that its model was made with. What needs example inputs after loading
(a lowering that checks itself, a benchmark) gets stand-ins: the same for every load, and integers are such as the model
was captured with, so that token numbers stay within their table.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quant2e.errors import FileFormatError

_SEED = 0
_MOST_DRAWN = 1 << 24
"""Elements that are drawn for all stand-ins of a file; what is larger repeats a part without taking more memory."""

_MOST_ELEMENTS = 1 << 48
_DEVIATIONS = 3.0
"""Standard deviations from the middle between two bounds to each of them."""

_DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.complex64, torch.complex128, torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32,
        torch.uint32, torch.int64,
    )
}  # fmt: skip


def describe_inputs(leaves: Sequence[Any], *, data: bool) -> list[dict[str, Any]]:
    """One entry for each flat input: shape, dtype and bounds of a tensor, with its bytes when ``data`` is set; a number
    or text as it is, since the graph was captured for it.
    """
    return [_described(leaf, data=data) for leaf in leaves]


def _described(leaf: Any, *, data: bool) -> dict[str, Any]:
    if isinstance(leaf, float):
        return {"float": repr(float(leaf))}
    if not isinstance(leaf, Tensor):
        return {"value": leaf if isinstance(leaf, (str, int, type(None))) else None}
    entry: dict[str, Any] = {"dtype": str(leaf.dtype).removeprefix("torch."), "shape": [int(n) for n in leaf.shape]}
    plain = leaf.detach().cpu().contiguous()
    if bounds := _bounds(plain):
        entry["bounds"] = bounds
    if data:
        entry["data"] = base64.b64encode(plain.view(-1).view(torch.uint8).numpy().data).decode("ascii")
    return entry


def _bounds(values: Tensor) -> list[float] | None:
    """The least and the largest value, those that are not finite aside; None where there are none."""
    if values.is_complex() or not values.numel():
        return None
    if not values.is_floating_point():
        numbers = values.numpy()
        return [int(numbers.min()), int(numbers.max())]
    finite = values.double()[torch.isfinite(values.double())]
    return [float(finite.min()), float(finite.max())] if finite.numel() else None


def restore_inputs(entries: Any) -> tuple[list[Any], bool]:
    """The flat inputs that `describe_inputs` described, and whether tensors among them are stand-ins.

    Raises `FileFormatError` for entries of another form. Takes no more memory than the entries, and 64 MiB.
    """
    if type(entries) is not list:
        raise FileFormatError("the example inputs are not described by a list")
    generator, left = torch.Generator().manual_seed(_SEED), _MOST_DRAWN
    leaves: list[Any] = []
    stand_ins = False
    for entry in entries:
        leaf, drawn = _restored(entry, generator, left)
        leaves.append(leaf)
        left -= drawn
        stand_ins = stand_ins or (isinstance(leaf, Tensor) and "data" not in entry)
    return leaves, stand_ins


def _restored(entry: Any, generator: torch.Generator, most: int) -> tuple[Any, int]:
    """One input, and how many elements were drawn for it."""
    keys = set(entry) if type(entry) is dict else set()
    if keys == {"value"} and type(entry["value"]) in (str, int, bool, type(None)):
        return entry["value"], 0
    if keys == {"float"} and type(entry["float"]) is str:
        return _float(entry["float"]), 0
    if not {"dtype", "shape"} <= keys <= {"dtype", "shape", "bounds", "data"}:
        raise FileFormatError("an example input has no form that is read")
    dtype, shape, bounds = _dtype(entry["dtype"]), _shape(entry["shape"]), entry.get("bounds")
    if bounds is not None:
        _check_bounds(bounds, dtype)
    if "data" in keys:
        return _tensor(entry["data"], dtype, shape), 0
    part = _part(shape, most)
    values = _drawn(part, dtype, bounds, generator)
    return values.expand(shape), values.numel()


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise FileFormatError(f"an example input is {text[:40]!r}, which is no number") from error


def _dtype(name: Any) -> torch.dtype:
    if type(name) is not str or name not in _DTYPES:
        raise FileFormatError(f"an example input is of {str(name)[:40]!r}, which is no dtype that inputs have")
    return _DTYPES[name]


def _shape(sizes: Any) -> tuple[int, ...]:
    plain = type(sizes) is list and all(type(size) is int and size >= 0 for size in sizes)
    if not plain or len(sizes) > 64 or math.prod(max(size, 1) for size in sizes) > _MOST_ELEMENTS:
        raise FileFormatError("an example input has a shape that no tensor has")
    return tuple(sizes)


def _check_bounds(bounds: Any, dtype: torch.dtype) -> None:
    if dtype.is_complex:
        raise FileFormatError("an example input of complex numbers has bounds, which those have not")
    number = float if dtype.is_floating_point else int
    if type(bounds) is not list or len(bounds) != 2 or any(type(bound) is not number for bound in bounds):
        raise FileFormatError("the bounds of an example input are not two numbers of its kind")
    low, high = bounds
    least, most = (0, 1) if dtype is torch.bool else (-math.inf, math.inf)
    if not dtype.is_floating_point and dtype is not torch.bool:
        least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if not (math.isfinite(low) and math.isfinite(high) and least <= low <= high <= most):
        raise FileFormatError("the bounds of an example input are not those of any values")


def _tensor(text: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise FileFormatError(f"the data of an example input is damaged: {error}") from error
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise FileFormatError("an example input has more or fewer bytes than its shape needs")
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def _part(shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """A shape of at most ``most`` elements that expands to ``shape``: the first sizes are 1 as far as needed."""
    part = list(shape)
    for index, size in enumerate(shape):
        if math.prod(part) <= max(most, 1):
            break
        part[index] = min(size, 1)
    return tuple(part)


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, bounds: Any, generator: torch.Generator) -> Tensor:
    """Noise: normal, within the bounds of floats; every integer between its bounds is as likely as the others."""
    if dtype.is_floating_point or dtype.is_complex:
        drawn = torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        if bounds is None:
            return drawn.to(dtype)
        low, high = bounds
        middle, deviation = low / 2 + high / 2, (high / 2 - low / 2) / _DEVIATIONS
        return _reaching(drawn.double().mul(deviation).add(middle).clamp(low, high), low, high).to(dtype)
    low, high = bounds or (0, 1)
    above = min(high + 1, torch.iinfo(torch.int64).max)
    drawn = torch.randint(min(low, above - 1), above, shape, generator=generator)
    return (drawn if bounds is None else _reaching(drawn, low, high)).to(dtype)


def _reaching(drawn: Tensor, low: float, high: float) -> Tensor:
    """``drawn``, its least value at ``low`` and its largest at ``high``, in place: a stand-in that is saved again is
    described as what it stands for.
    """
    if drawn.numel() > 1:
        least, largest = int(drawn.argmin()), int(drawn.argmax())
        drawn.view(-1)[least], drawn.view(-1)[largest if largest != least else -1 - least] = low, high
    return drawn
