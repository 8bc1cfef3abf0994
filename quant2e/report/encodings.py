"""Encodings of a model, as data: which points share parameters, with which numbers, and what calibration found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from quant2e.annotation.plan import Group
from quant2e.annotation.specs import spec_text
from quant2e.errors import FileFormatError
from quant2e.files import atomic_file
from quant2e.observers.encodings import (
    CustomEncoding,
    DynamicEncoding,
    Encoding,
    Float16Encoding,
    PerGroupEncoding,
    PerTensorEncoding,
    RoundedConstant,
)
from quant2e.report.record import GraphRecord

ENCODINGS_FORMAT = 1


@dataclass(frozen=True, slots=True, repr=False)
class GroupEncoding:
    """One group of points that share parameters.

    ``spec``: the numbers asked for, as text. ``encoding``: what they became: ``per_tensor``, ``per_channel``,
    ``per_group`` (of ``group_size`` neighbours in a row; rows first), ``dynamic``, ``float16``, ``on_grid`` (a float
    constant rounded to multiples of a derived scale), ``custom`` or ``float``. ``scale``/``zero_point``: one per tensor
    or per channel; empty when they are found at run time.
    """

    points: tuple[str, ...]
    spec: str
    encoding: str
    dtype: str = ""
    quant_min: int = 0
    quant_max: int = 0
    axis: int | None = None
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()
    group_size: int = 0

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
    if len(set(values)) < 2:
        return "".join(f"{value:.4g}" for value in values[:1])
    return f"{min(values):.4g}..{max(values):.4g} ({len(values)})"


@dataclass(frozen=True, slots=True, repr=False)
class Encodings:
    """Everything about how a model was quantized. ``quantizer``: the name of what annotated it.

    ``repr`` counts the groups; ``as_dict`` and ``to_file`` have all numbers.
    """

    quantizer: str
    groups: tuple[GroupEncoding, ...]

    def __repr__(self) -> str:
        counts = Counter(group.encoding for group in self.groups)
        told = ", ".join(f"{count} {encoding}" for encoding, count in counts.most_common())
        by = f" by {self.quantizer}" if self.quantizer else ""
        return f"Encodings{by}: {len(self.groups)} groups of points{': ' if told else ''}{told}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `from_dict` is its inverse."""
        return {"format": ENCODINGS_FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Encodings:
        """The encodings that `as_dict` described. Raises `FileFormatError` for another format."""
        if not isinstance(data, dict):
            raise FileFormatError(f"a record of encodings is a JSON object, and this is a {type(data).__name__}")
        if data.get("format") != ENCODINGS_FORMAT:
            raise FileFormatError(
                f"encodings format {data.get('format')!r}: this version reads format {ENCODINGS_FORMAT}"
            )
        groups = tuple(
            GroupEncoding(
                points=tuple(g["points"]),
                spec=g["spec"],
                encoding=g["encoding"],
                dtype=g["dtype"],
                quant_min=g["quant_min"],
                quant_max=g["quant_max"],
                axis=g["axis"],
                scale=tuple(g["scale"]),
                zero_point=tuple(g["zero_point"]),
                group_size=g.get("group_size", 0),
            )
            for g in data["groups"]
        )
        return cls(str(data["quantizer"]), groups)

    def to_file(self, path: str | Path) -> None:
        """Write as JSON; an existing file is replaced only once the new one is complete."""
        with atomic_file(Path(path)) as part:
            part.write_text(json.dumps(self.as_dict(), indent=1), encoding="utf-8")

    @classmethod
    def from_file(cls, path: str | Path) -> Encodings:
        """Read what `to_file` wrote. Raises `FileFormatError` when it is not a record of encodings."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise FileFormatError(f"{path} is not a record of encodings: {error}") from error


def encodings_of(record: GraphRecord, quantizer: str) -> Encodings:
    """The encodings of a converted graph, from its record."""
    pairs = zip(record.plan.groups, record.encodings, strict=True)
    return Encodings(quantizer, tuple(_group_encoding(group, encoding) for group, encoding in pairs))


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
        return bare
    if isinstance(encoding, PerTensorEncoding):
        return replace(bare, encoding="per_tensor", scale=(encoding.scale,), zero_point=(encoding.zero_point,))
    return replace(
        bare,
        encoding="per_group" if isinstance(encoding, PerGroupEncoding) else "per_channel",
        axis=None if isinstance(encoding, PerGroupEncoding) else encoding.axis,
        group_size=encoding.group_size if isinstance(encoding, PerGroupEncoding) else 0,
        scale=scale_values(encoding.scale),
        zero_point=zero_point_values(encoding.zero_point),
    )


def scale_values(scale: Tensor) -> tuple[float, ...]:
    """The shortest decimals that give each float32 back: half the size, where a table has a scale for each row."""
    return tuple(float(str(value)) for value in scale.detach().flatten().float().cpu().numpy())


def zero_point_values(zero_point: Tensor) -> tuple[int, ...]:
    """Zero points one after the other; floats under ``per_channel_affine_float_qparams``."""
    return tuple(zero_point.flatten().tolist())
