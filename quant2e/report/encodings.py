"""How a model was quantized, as data: which points share parameters, with which numbers, and what calibration found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quant2e.annotation.plan import Group
from quant2e.annotation.specs import spec_text
from quant2e.errors import FileFormatError
from quant2e.files import atomic_file
from quant2e.observers.encodings import Custom, Dynamic, Encoding, HalfPrecision, OnGrid, PerGroup, PerTensor
from quant2e.report.record import Ledger

RECIPE_FORMAT = 1


@dataclass(frozen=True, slots=True)
class GroupRecipe:
    """One group of points that share parameters.

    ``spec``: the numbers asked for, as text. ``encoding``: what they became: ``per_tensor``, ``per_channel``,
    ``per_group`` (of ``group_size`` neighbours in a row; rows first), ``dynamic``, ``float16``, ``on_grid`` (a float constant rounded to multiples of a derived scale), ``custom`` or
    ``float``. ``scale``/``zero_point``: one per tensor or per channel; empty when they are found at run time.
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


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything about how a model was quantized. ``quantizer``: the name of what annotated it."""

    quantizer: str
    groups: tuple[GroupRecipe, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `from_dict` is its inverse."""
        return {"format": RECIPE_FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `as_dict` described. Raises `FileFormatError` for another format."""
        if not isinstance(data, dict):
            raise FileFormatError(f"a recipe is a JSON object, and this is a {type(data).__name__}")
        if data.get("format") != RECIPE_FORMAT:
            raise FileFormatError(f"recipe format {data.get('format')!r}: this version reads format {RECIPE_FORMAT}")
        groups = tuple(
            GroupRecipe(
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
    def from_file(cls, path: str | Path) -> Recipe:
        """Read what `to_file` wrote. Raises `FileFormatError` when it is not a recipe."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise FileFormatError(f"{path} is not a recipe: {error}") from error


def recipe_of(ledger: Ledger, quantizer: str) -> Recipe:
    """The recipe of a converted graph, from its ledger."""
    pairs = zip(ledger.plan.groups, ledger.encodings, strict=True)
    return Recipe(quantizer, tuple(_group_recipe(group, encoding) for group, encoding in pairs))


def _group_recipe(group: Group, encoding: Encoding | None) -> GroupRecipe:
    points, spec = tuple(str(p) for p in group.points), spec_text(group.spec)
    if encoding is None:
        return GroupRecipe(points, spec, "float")
    if isinstance(encoding, Custom):
        return GroupRecipe(points, spec, "custom")
    if isinstance(encoding, HalfPrecision):
        return GroupRecipe(points, spec, "float16")
    if isinstance(encoding, OnGrid):
        return GroupRecipe(points, spec, "on_grid", "float32")
    dtype = str(encoding.dtype).removeprefix("torch.")
    bare = GroupRecipe(points, spec, "dynamic", dtype, encoding.quant_min, encoding.quant_max)
    if isinstance(encoding, Dynamic):
        return bare
    if isinstance(encoding, PerTensor):
        return replace(bare, encoding="per_tensor", scale=(encoding.scale,), zero_point=(encoding.zero_point,))
    return replace(
        bare,
        encoding="per_group" if isinstance(encoding, PerGroup) else "per_channel",
        axis=None if isinstance(encoding, PerGroup) else encoding.axis,
        group_size=encoding.group_size if isinstance(encoding, PerGroup) else 0,
        # The shortest decimals that give the float32 back: half the size, where a table has a scale for each row.
        scale=tuple(float(str(value)) for value in encoding.scale.flatten().float().cpu().numpy()),
        zero_point=tuple(encoding.zero_point.flatten().tolist()),
    )
