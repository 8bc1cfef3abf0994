"""Time programs side by side on this machine, on the same inputs where all take them.

Every program is called in turn, so that a machine that slows down slows all of them; times are medians, ratios are
medians of the ratios within each round. Load time and memory are measured in a process for each program, times in a
process for each number of threads.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowering.bench.inputs import chosen, own_inputs
from lowering.bench.worker import Footprint, in_child, measure_footprint, measure_times
from quant2e.page.section import PageSection
from quant2e.report.plain_data import plain_data
from quant2e.stages import stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One program. ``medians`` and ``ratios``:
    milliseconds, and how much faster than the first, by number of threads.
    """

    path: Path
    size: int
    footprint: Footprint
    medians: dict[int, float]
    ratios: dict[int, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**plain_data(self)}

    def page_sections(self) -> tuple[PageSection, ...]:
        """A row of the table of latencies, which the rows of all programs share."""
        names = [(f"ms, {count} thread(s)", f"ratio, {count} thread(s)") for count in self.medians]
        section = PageSection(
            title="Latency",
            headers=("program", "bytes", "load, ms", "peak, MB", *(name for pair in names for name in pair)),
            rows=(
                (
                    self.path.name,
                    self.size,
                    self.footprint.load_ms,
                    self.footprint.peak_mb,
                    *(value for count in self.medians for value in (self.medians[count], self.ratios[count])),
                ),
            ),
            data=[self.as_dict()],
            joined=True,
        )
        return (section,)


def bench(
    programs: Sequence[Path],
    *,
    inputs: Path | None = None,
    threads: Sequence[int] = (1,),
    rounds: int | None = None,
    method: str | None = None,
) -> list[Row]:
    """Size, load time, memory and interleaved times of program files. Arguments: as of the command line.

    Raises `LoweringError` for a program that does not load or run, `FileFormatError` for a file of another kind, one
    that has changed since it was written, and one that crashes its runtime.
    """
    sizes, counts = [path.stat().st_size for path in programs], list(dict.fromkeys(threads))
    alone = inputs is not None or len(programs) == 1
    steps = itertools.count(1)
    with stage("time programs") as shown, tempfile.TemporaryDirectory() as folder:

        def done(function: Callable[..., Any], *args: Any) -> Any:
            shown(next(steps), len(programs) * (1 if alone else 2) + len(counts))
            return in_child(function, *args)

        files: list[Path | None] = [inputs] * len(programs)
        if not alone:
            own = [done(own_inputs, path, method, Path(folder, f"{i}.pt")) for i, path in enumerate(programs)]
            files = [*chosen(own)]
        footprints = [
            done(measure_footprint, path, file, method, threads[0]) for path, file in zip(programs, files, strict=True)
        ]
        times = {count: done(measure_times, tuple(programs), tuple(files), method, count, rounds) for count in counts}
    return [
        Row(
            path=path,
            size=sizes[place],
            footprint=footprints[place],
            medians={count: statistics.median(found[place]) * 1e3 for count, found in times.items()},
            ratios={
                count: statistics.median(first / other for first, other in zip(found[0], found[place], strict=True))
                for count, found in times.items()
            },
        )
        for place, path in enumerate(programs)
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as text with aligned columns."""
    counts = list(rows[0].medians)
    head = ["program", "size MB", "load ms", "peak MB"]
    head += [f"{unit} {count} thr" for count in counts for unit in ("ms", "ratio")]
    lines = [head]
    for row in rows:
        line = [row.path.name, f"{row.size / 1e6:.2f}", f"{row.footprint.load_ms:.1f}", f"{row.footprint.peak_mb:.1f}"]
        line += [text for count in counts for text in (f"{row.medians[count]:.3f}", f"{row.ratios[count]:.2f}")]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*told, *_inputs(rows)])


def _inputs(rows: Sequence[Row]) -> list[str]:
    """What the programs were run on; where that differs, that their times do not compare."""
    found = dict.fromkeys(row.footprint.inputs for row in rows)
    if len(found) == 1:
        return [f"run on {inputs}" for inputs in found if inputs]
    return [
        "no inputs of one program are taken by all, so that each ran on its own, and times do not compare (--inputs):",
        *(f"  {row.path.name} on {row.footprint.inputs}" for row in rows),
    ]
