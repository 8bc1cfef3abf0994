"""What the peers' benchmark found: rows, ratios between rows, geometric means over them, and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quant2e.files import atomic_file

EAGER = "float eager"
OURS = ("ours → native", "ours → Inductor", "ours → ExecuTorch", "ours → OpenVINO")
HEADS = (
    "model", "batch", "threads", "engine", "ms", "faster than eager", *(f"{ours} is faster" for ours in OURS),
    "of the limit", "SQNR dB", "file MB", "lower s", "peak MB",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One engine on one model. ``failed``: why it has no numbers.

    ``times``: milliseconds, the median of each round, neighbours of the same rounds of the other engines. ``sqnr_db``:
    of the first output against the float model's. ``size``: bytes of the program's files, 0 where there are none.
    ``seconds``: from the float model to a program. ``peak``: bytes of the process that ran it. ``limit``: milliseconds
    that all multiply-accumulates take in int8 at the peak rate of the processor's instructions, on these threads.
    """

    model: str
    batch: int
    threads: int
    engine: str
    failed: str = ""
    times: tuple[float, ...] = ()
    sqnr_db: float | None = None
    size: int = 0
    seconds: float = 0.0
    peak: int = 0
    limit: float = 0.0
    version: str = ""

    @property
    def setting(self) -> tuple[str, int, int]:
        """Model, batch size and number of threads: rows that agree in it were measured in turn."""
        return self.model, self.batch, self.threads

    @property
    def ms(self) -> float:
        """Median time of a call."""
        return statistics.median(self.times)

    def plain(self) -> dict[str, Any]:
        """For JSON, with the median spelled out."""
        sqnr = "bit-equal" if self.sqnr_db == math.inf else self.sqnr_db
        return {**asdict(self), "sqnr_db": sqnr, "ms": self.ms if self.times else None}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Row:
        """The inverse of `plain`."""
        known = {name: value for name, value in data.items() if name != "ms"}
        sqnr = math.inf if data["sqnr_db"] == "bit-equal" else data["sqnr_db"]
        return cls(**{**known, "times": tuple(data["times"]), "sqnr_db": sqnr})


def sqnr_db(output: np.ndarray, reference: np.ndarray) -> float:
    """10·log10(Σ reference² / Σ (output − reference)²); ``inf`` when equal, NaN when the output is not finite."""
    if output.shape != reference.shape:
        return math.nan
    wide = reference.astype(np.float64)
    noise = float(np.square(output.astype(np.float64) - wide).sum())
    return math.inf if noise == 0 else 10 * math.log10(float(np.square(wide).sum()) / noise) if noise > 0 else math.nan


def ratio(slow: Row | None, fast: Row | None) -> float | None:
    """How many times faster ``fast`` is: the median over rounds, None where one of them has no times."""
    if slow is None or fast is None or not slow.times or not fast.times:
        return None
    return statistics.median(a / b for a, b in zip(slow.times, fast.times, strict=False))


def by_setting(rows: Iterable[Row]) -> dict[tuple[str, int, int], dict[str, Row]]:
    """Rows by setting, then by engine, in the order they come in."""
    found: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.setting, {})[row.engine] = row
    return found


def lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """One line per row, as `HEADS` says; a row without numbers says why."""
    settings = by_setting(rows)
    for row in rows:
        beside = settings[row.setting]
        head = (row.model, str(row.batch), str(row.threads), row.engine)
        if row.failed:
            yield (*head, f"failed: {row.failed}".replace("|", "\\|"), *["–"] * (len(HEADS) - 5))
            continue
        ratios = [ratio(beside.get(EAGER), row), *(ratio(row, beside.get(ours)) for ours in OURS)]
        yield (
            *head,
            f"{row.ms:.2f}",
            *(_number(value, ".2f", " ×") for value in ratios),
            _number(row.limit / row.ms if row.limit else None, ".0%"),
            "bit-equal" if row.sqnr_db == math.inf else _number(row.sqnr_db, ".1f"),
            f"{row.size / 1e6:.1f}" if row.size else "–",
            f"{row.seconds:.1f}",
            f"{row.peak / 1e6:.0f}",
        )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """How many times faster ours is than a peer over all settings in which both ran;
    ``worst``: where it is the least.
    """

    ours: str
    peer: str
    mean: float
    settings: int
    worst: float
    where: tuple[str, int, int] = field(default=("", 0, 0))

    def __str__(self) -> str:
        model, batch, threads = self.where
        return (
            f"{self.ours} is {self.mean:.2f} × as fast as {self.peer}: geometric mean of {self.settings} setting(s); "
            f"least: {self.worst:.2f} × on {model}, batch {batch}, {threads} thread(s)"
        )


def means(rows: Sequence[Row]) -> Iterator[Mean]:
    """Geometric means of ours over each peer."""
    settings = by_setting(rows)
    engines = dict.fromkeys(row.engine for row in rows)
    for ours in OURS:
        for peer in engines:
            found = {
                setting: value
                for setting, beside in settings.items()
                if peer != ours and (value := ratio(beside.get(peer), beside.get(ours))) is not None
            }
            if found:
                worst = min(found, key=lambda setting: found[setting])
                yield Mean(
                    ours=ours,
                    peer=peer,
                    mean=statistics.geometric_mean(found.values()),
                    settings=len(found),
                    worst=found[worst],
                    where=worst,
                )


def plot(rows: Sequence[Row], path: Path) -> None:
    """One line per setting, one mark per engine: its time over that of the float model in eager mode, to the left is
    faster.

    Raises ImportError when matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "quant2e"  # the same rows, the same file
    from matplotlib import pyplot as plt

    settings = by_setting(row for row in rows if row.times)
    engines = list(dict.fromkeys(row.engine for row in rows))
    figure, axes = plt.subplots(figsize=(10, max(4.0, 1.2 + 0.32 * len(settings))), layout="constrained")
    colors = plt.get_cmap("tab20").colors
    for place, engine in enumerate(engines):
        at = [(y, beside) for y, beside in enumerate(settings.values()) if engine in beside and EAGER in beside]
        style = {"marker": "D", "s": 60, "zorder": 3} if engine in OURS else {"marker": "o", "s": 30, "zorder": 2}
        axes.scatter(
            [beside[engine].ms / beside[EAGER].ms for _, beside in at],
            [p for p, _ in at],
            label=engine,
            color=colors[place % len(colors)],
            **style,
        )
    axes.set_yticks(range(len(settings)), [f"{m}, batch {b}, {t} thr" for m, b, t in settings])
    axes.set_ylim(len(settings) - 0.5, -0.5)  # the first setting on top
    axes.set_xscale("log")
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.set_xlabel("time of a call over that of the float model in eager mode; to the left is faster")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    with atomic_file(path) as part:
        figure.savefig(part, metadata={"Date": None})
    plt.close(figure)
