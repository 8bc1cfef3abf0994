"""Encodings of a model, as data: which points share parameters, with which numbers, and what calibration found."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from quant2e.annotation.granularity import Granularity, PerAxis, PerTensor, PerToken
from quant2e.annotation.plan import Group
from quant2e.annotation.specs import spec_text
from quant2e.documents.json_text import read_json
from quant2e.documents.review import change_of, review
from quant2e.documents.schema import LATER, from_record, of_format
from quant2e.documents.tensor_numbers import TensorNumbers, plain_numbers, tensor_of
from quant2e.errors import AnnotationError, FileFormatError
from quant2e.files import atomic_file
from quant2e.graph.control_flow import prefixed
from quant2e.observers.encodings import (
    CustomEncoding,
    DynamicEncoding,
    Encoding,
    Float16Encoding,
    PerGroupEncoding,
    PerTensorEncoding,
    RoundedConstant,
)
from quant2e.report.algorithm_step import kept_algorithms
from quant2e.report.record import GraphRecord

ENCODINGS_FORMAT = 1

ENCODINGS = ("per_tensor", "per_channel", "per_group", "dynamic", "float16", "on_grid", "custom", "float")

GRANULARITIES: Mapping[str, Granularity] = {"": PerTensor(), "token": PerToken(), "image": PerAxis(0)}
"""What shares a scale that is found at run time, by the names that they have in records."""


@dataclass(frozen=True, slots=True, repr=False)
class GroupEncoding:
    """One group of points that share parameters.

    ``spec``: the numbers asked for, as text; for readers. ``encoding``: what they became: ``per_tensor``,
    ``per_channel``, ``per_group`` (of ``group_size`` neighbours in a row; rows first), ``dynamic``, ``float16``,
    ``on_grid`` (a float constant rounded to multiples of a scale that is derived from those of other points; a
    ``scale`` of its own is only there when somebody wrote it), ``custom`` or ``float``. ``scale``/``zero_point``: one
    per tensor or per channel; empty when they are found at run time, and then ``symmetric`` says whether zero is the
    integer zero, ``eps`` what the smallest scale is (0: the default) and ``granularity`` what shares one: ``""`` the
    tensor, ``"token"`` or ``"image"``. Scales are positive and finite, zero points finite, and there are as many of
    both; a scale ``on_grid`` has no zero point. Many numbers are `TensorNumbers`, over the tensors of the graph: as a
    tuple of them, without its memory. In a file all but ``points`` and ``encoding`` may be left out.
    """

    points: tuple[str, ...]
    spec: str = field(default="", metadata=LATER)
    encoding: str = ""
    dtype: str = field(default="", metadata=LATER)
    quant_min: int = field(default=0, metadata=LATER)
    quant_max: int = field(default=0, metadata=LATER)
    axis: int | None = field(default=None, metadata=LATER)
    scale: Sequence[float] = field(default=(), metadata=LATER)
    zero_point: Sequence[int | float] = field(default=(), metadata=LATER)
    group_size: int = field(default=0, metadata=LATER)
    symmetric: bool | None = field(default=None, metadata=LATER)
    eps: float = field(default=0.0, metadata=LATER)
    granularity: str = field(default="", metadata=LATER)

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise AnnotationError(f"'{self.encoding[:80]}' is none of the encodings {', '.join(ENCODINGS)}")
        if self.quant_min > self.quant_max:
            raise AnnotationError(f"the range [{self.quant_min}, {self.quant_max}] is empty")
        if not _all(self.scale, lambda scale: (scale > 0) & (scale < math.inf)):
            raise AnnotationError("a scale is not a positive, finite number")
        if not _all(self.zero_point, lambda point: (abs(point) < math.inf) & (abs(point) <= sys.float_info.max)):
            raise AnnotationError("a zero point is not finite")
        if self.granularity not in GRANULARITIES:
            raise AnnotationError(f"'{self.granularity[:80]}' is none of the granularities {', '.join(GRANULARITIES)}")
        if not 0 <= self.eps < math.inf:
            raise AnnotationError("eps, the smallest scale, is not a finite number")
        if len(self.scale) != len(self.zero_point) and (self.encoding != "on_grid" or self.zero_point):
            raise AnnotationError(f"{len(self.scale)} scales and {len(self.zero_point)} zero points do not pair up")

    def __repr__(self) -> str:
        """One line, whatever the number of scales."""
        numbers = {
            "dtype": self.dtype,
            "axis": "" if self.axis is None else str(self.axis),
            "group_size": str(self.group_size or ""),
            "scale": _range(self.scale),
            "zero_point": _range(self.zero_point),
        }
        told = ", ".join(f"{name} {text}" for name, text in numbers.items() if text)
        points = self.points[0] if len(self.points) == 1 else f"{len(self.points)} points from {self.points[0]}"
        return f"GroupEncoding({points}: {self.encoding}{', ' if told else ''}{told})"


def _range(values: Sequence[float]) -> str:
    """The value, or how many there are and between which bounds."""
    low, high = (float(bound) for bound in tensor_of(values).aminmax()) if len(values) else (0.0, 0.0)
    if low == high:
        return "".join(f"{value:.4g}" for value in values[:1])
    return f"{low:.4g}..{high:.4g} ({len(values)})"


def _all(values: Sequence[float], holds: Callable[[Any], Any]) -> bool:
    """Whether something holds of all numbers."""
    return bool(holds(values.flat()).all()) if isinstance(values, TensorNumbers) else all(map(holds, values))


@dataclass(frozen=True, slots=True, repr=False)
class Encodings:
    """Everything about how a model was quantized. ``quantizer``: the name of what annotated it.

    ``algorithms``: those that changed its weights before these numbers were found, and chose their integers; the
    numbers are of a model that went through the same.

    ``repr`` counts the groups; ``as_dict`` and ``to_file`` have all numbers.
    """

    quantizer: str
    groups: tuple[GroupEncoding, ...]
    algorithms: tuple[str, ...] = field(default=(), metadata=LATER)

    def __repr__(self) -> str:
        counts = Counter(group.encoding for group in self.groups)
        told = ", ".join(f"{count} {encoding}" for encoding, count in counts.most_common())
        by = f" by {self.quantizer}" if self.quantizer else ""
        by += f" after {', '.join(self.algorithms)}" if self.algorithms else ""
        return f"Encodings{by}: {len(self.groups)} groups of points{': ' if told else ''}{told}"

    def diff(self, other: Encodings) -> str:
        """What ``other`` changes, as a review: removed, added, other kinds, other numbers with the relative change."""
        return _difference(self, other)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `from_dict` is its inverse."""
        given = encodings_record(self)
        groups = ({name: plain_numbers(value) for name, value in group.items()} for group in given["groups"])
        return {**given, "groups": tuple(groups)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Encodings:
        """The encodings that `as_dict` described. Raises `FileFormatError` for anything else."""
        of_format(data, (ENCODINGS_FORMAT,), "the record of encodings")
        return from_record(cls, data, "the record of encodings", besides=("format",))

    def to_file(self, path: str | Path) -> None:
        """Write as JSON; an existing file is replaced only once the new one is complete."""
        with atomic_file(Path(path)) as part, part.open("w", encoding="utf-8") as file:
            file.writelines(_lines(encodings_record(self)))

    @classmethod
    def from_file(cls, path: str | Path) -> Encodings:
        """Read what `to_file` wrote. Raises `FileFormatError` when it is not a record of encodings."""
        try:
            return cls.from_dict(read_json(Path(path).read_bytes(), str(path)))
        except FileFormatError as error:
            raise FileFormatError(f"{path} is not a record of encodings: {error}") from error


def encodings_record(encodings: Encodings) -> dict[str, Any]:
    """As `Encodings.as_dict`, with the sequences of numbers themselves."""
    names = [part.name for part in fields(GroupEncoding)]
    groups = tuple({name: getattr(group, name) for name in names} for group in encodings.groups)
    return {
        "format": ENCODINGS_FORMAT,
        "quantizer": encodings.quantizer,
        "groups": groups,
        "algorithms": encodings.algorithms,
    }


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    """JSON to be edited by hand: a line for each part of a group that says something, numbers next to each other."""
    usual = {part.name: part.default for part in fields(GroupEncoding)}
    yield "{\n"
    yield from (f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in data.items() if name != "groups")
    yield ' "groups": ['
    for index, group in enumerate(data["groups"]):
        said = {name: value for name, value in group.items() if value != usual[name]}
        parts = (f"   {json.dumps(k)}: {json.dumps(plain_numbers(v), allow_nan=False)}" for k, v in said.items())
        yield f"{',' * (index > 0)}\n  {{\n" + ",\n".join(parts) + "\n  }"
    yield "\n ]\n}\n"


def _difference(old: Encodings, new: Encodings) -> str:
    """What was removed, added, became another kind, and which numbers changed, by how much; like changes together."""
    pairs, removed, added = _paired(old, new)
    kinds, numbers, shares = [], [], []
    for before, after in pairs:
        name = _name(after)
        if gone := sorted(set(before.points) - set(after.points)):
            shares.append((name, f"no longer shares with {', '.join(gone[:3])}"))
        if come := sorted(set(after.points) - set(before.points)):
            shares.append((name, f"now shares with {', '.join(come[:3])}"))
        if _kind(before) != _kind(after):
            kinds.append((name, f"{_kind(before)} -> {_kind(after)}"))
        elif words := ", ".join(_changes(before, after)):
            numbers.append((name, words))
    by = f" by {old.quantizer} -> {new.quantizer}" if old.quantizer != new.quantizer else ""
    if old.algorithms != new.algorithms:
        by += f" after {', '.join(old.algorithms) or 'no algorithm'} -> {', '.join(new.algorithms) or 'none'}"
    return review(
        f"encodings{by}: {len(old.groups)} -> {len(new.groups)} groups of points",
        [
            ("removed", [(_name(group), _kind(group)) for group in removed]),
            ("added", [(_name(group), _kind(group)) for group in added]),
            ("other kind", kinds),
            ("other numbers", numbers),
            ("other shares", shares),
        ],
    )


def _paired(
    old: Encodings, new: Encodings
) -> tuple[list[tuple[GroupEncoding, GroupEncoding]], list[GroupEncoding], list[GroupEncoding]]:
    """Groups that have a point in common, the first of each; those of the first record alone; of the second alone."""
    known = {point: index for index, group in enumerate(old.groups) for point in group.points}
    free = set(range(len(old.groups)))
    pairs, added = [], []
    for group in new.groups:
        index = next((known[point] for point in group.points if known.get(point) in free), None)
        if index is None:
            added.append(group)
            continue
        free.discard(index)
        pairs.append((old.groups[index], group))
    return pairs, [old.groups[index] for index in sorted(free)], added


def _name(group: GroupEncoding) -> str:
    more = f" (+{len(group.points) - 1})" if len(group.points) > 1 else ""
    return f"({group.points[0] if group.points else ''}){more}"


def _kind(group: GroupEncoding) -> str:
    """Encoding, dtype and range, axis, size of groups: all but the numbers that calibration finds."""
    parts = [group.encoding]
    if group.encoding in ("float", "float16", "custom", "on_grid"):
        return parts[0]
    parts.append(f"{group.dtype}[{group.quant_min}, {group.quant_max}]")
    parts += [f"axis {group.axis}"] if group.axis is not None else []
    parts += [f"groups of {group.group_size}"] if group.group_size else []
    parts += [f"for each {group.granularity}"] if group.granularity else []
    parts += ["symmetric"] if group.symmetric else []
    return " ".join(parts)


def _changes(before: GroupEncoding, after: GroupEncoding) -> Iterator[str]:
    if before.scale != after.scale:
        yield from _moved("scale", before.scale, after.scale)
    if before.zero_point != after.zero_point:
        yield from _moved("zero point", before.zero_point, after.zero_point)
    if before.eps != after.eps:
        yield f"smallest scale {change_of(before.eps, after.eps)}"


def _moved(what: str, old: Sequence[float], new: Sequence[float]) -> Iterator[str]:
    """One number, or how many of several changed and the one that changed most."""
    if len(old) != len(new):
        yield f"{len(old)} -> {len(new)} {what}s"
        return
    if len(old) == 1:
        yield f"{what} {change_of(old[0], new[0])}"
        return
    distance = _distances(tensor_of(old).double(), tensor_of(new).double())
    most = int(distance.argmax())
    moved = int((distance > 0).sum())
    yield f"{moved} of {len(old)} {what}s, most in number {most}: {change_of(old[most], new[most])}"


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How far numbers are apart, whichever is larger: as a factor where both are positive; 0 for equal ones."""
    factor = torch.where((a > 0) & (b > 0), torch.maximum(a / b, b / a), (a - b).abs())
    return torch.where(a == b, 0.0, factor)


def encodings_of(record: GraphRecord, quantizer: str) -> Encodings:
    """The encodings of a converted graph, from its record."""
    return Encodings(quantizer, tuple(_groups(record, "")), kept_algorithms(record.report.algorithms))


def _groups(record: GraphRecord, path: str) -> Iterator[GroupEncoding]:
    """The groups of a graph, whose points are named by the body that they lie in, and those of its bodies."""
    for group, encoding in zip(record.plan.groups, record.encodings, strict=True):
        made = _group_encoding(group, encoding)
        yield replace(made, points=tuple(prefixed(path, point) for point in made.points))
    for name, body in record.bodies.items():
        yield from _groups(body, prefixed(path, name))


def _group_encoding(group: Group, encoding: Encoding | None) -> GroupEncoding:
    points, spec = tuple(str(p) for p in group.points), spec_text(group.spec)
    if encoding is None:
        return GroupEncoding(points, spec, "float")
    if isinstance(encoding, CustomEncoding):
        return GroupEncoding(points, spec, "custom")
    if isinstance(encoding, Float16Encoding):
        return GroupEncoding(points, spec, "float16")
    if isinstance(encoding, RoundedConstant):
        return GroupEncoding(points, spec, "on_grid", "float32")
    dtype = str(encoding.dtype).removeprefix("torch.")
    bare = GroupEncoding(points, spec, "dynamic", dtype, encoding.quant_min, encoding.quant_max)
    if isinstance(encoding, DynamicEncoding):
        (grain,) = (name for name, granularity in GRANULARITIES.items() if granularity == encoding.granularity)
        return replace(bare, symmetric=encoding.symmetric, eps=encoding.eps, granularity=grain)
    if isinstance(encoding, PerTensorEncoding):
        return replace(bare, encoding="per_tensor", scale=(encoding.scale,), zero_point=(encoding.zero_point,))
    return replace(
        bare,
        encoding="per_group" if isinstance(encoding, PerGroupEncoding) else "per_channel",
        axis=None if isinstance(encoding, PerGroupEncoding) else encoding.axis,
        group_size=encoding.group_size if isinstance(encoding, PerGroupEncoding) else 0,
        scale=TensorNumbers(encoding.scale),
        zero_point=TensorNumbers(encoding.zero_point),
    )
