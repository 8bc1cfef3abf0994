"""A row of the zoo's table: what became of one architecture. Rows are read from and written to ``rows.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quant2e.files import atomic_file

ROWS = Path(__file__).parent / "rows.json"

SAME_SQNR_DB = 1.5
"""Another processor adds in another order, so that an integer here and there is its neighbour."""

SAME_SHARE = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """One quantizer. ``share``: of the multiply-accumulates, on integers; None where there are none.

    ``sqnr_db``: of the outputs on data that was not calibrated on; ``other_db``: the same with other sizes, where some
    vary. ``float_work``: why multiplications stay float, with how many ops do. ``refused``: why there is no result.
    """

    share: float | None = None
    sqnr_db: float | None = None
    other_db: float | None = None
    saved: str = ""
    float_work: Mapping[str, int] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """One target. ``parts``: delegates, or integer kernels; ``kernels``: ops that run outside of them, or in float.

    ``sqnr_db``: against the Q/DQ graph, None where bits are equal. ``refused``: why there is no program.
    """

    parts: int = 0
    kernels: int = 0
    sqnr_db: float | None = None
    refused: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``quantizers``, ``targets``: by name. ``crashes``: errors that are none of ours, by where they were raised."""

    name: str
    family: str
    parameters: int
    varying: Sequence[str]
    quantizers: Mapping[str, Quantized]
    targets: Mapping[str, Lowered]
    crashes: Mapping[str, str] = field(default_factory=dict)


def read(path: Path = ROWS) -> dict[str, Row]:
    """The rows of a file, by name."""
    return {row["name"]: _row(row) for row in json.loads(path.read_text(encoding="utf-8"))}


def _row(data: dict[str, Any]) -> Row:
    quantizers = {name: Quantized(**one) for name, one in data["quantizers"].items()}
    targets = {name: Lowered(**one) for name, one in data["targets"].items()}
    return Row(**{**data, "varying": tuple(data["varying"]), "quantizers": quantizers, "targets": targets})


def write(rows: Sequence[Row], path: Path = ROWS) -> None:
    """Write a file of rows."""
    text = json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False)
    with atomic_file(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def differences(stored: Row, found: Row) -> Iterator[str]:
    """Where a row is no longer what it was, a sentence each; better counts as well, and is stored with ``--update``."""
    if (stored.parameters, tuple(stored.varying)) != (found.parameters, tuple(found.varying)):
        yield f"{stored.parameters} parameters, sizes {stored.varying}: now {found.parameters}, {found.varying}"
    for name in sorted(stored.quantizers.keys() | found.quantizers.keys()):
        a, b = stored.quantizers.get(name, Quantized()), found.quantizers.get(name, Quantized())
        yield from _numbers(name, a, b, {"share": SAME_SHARE, "sqnr_db": SAME_SQNR_DB, "other_db": SAME_SQNR_DB})
        yield from _texts(name, a, b, ("saved", "float_work", "refused"))
    for name in sorted(stored.targets.keys() | found.targets.keys()):
        one, other = stored.targets.get(name, Lowered()), found.targets.get(name, Lowered())
        yield from _texts(name, one, other, ("parts", "kernels", "refused"))


def _numbers(name: str, stored: Any, found: Any, tolerances: Mapping[str, float]) -> Iterator[str]:
    for what, tolerance in tolerances.items():
        a, b = getattr(stored, what), getattr(found, what)
        if (a is None) != (b is None) or (a is not None and not math.isclose(a, b, rel_tol=0, abs_tol=tolerance)):
            yield f"{name}: {what} was {a}, and is {b}"


def _texts(name: str, stored: Any, found: Any, fields: Sequence[str]) -> Iterator[str]:
    for what in fields:
        a, b = getattr(stored, what), getattr(found, what)
        if a != b:
            yield f"{name}: {what} was {a!r}, and is {b!r}"
