"""What was measured, as tables for people and programs, and as plots."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.qat import Trained
from benchmarks.accuracy.row import METHODS, Row
from benchmarks.accuracy.targets import Target
from benchmarks.accuracy.tuning import Tuned
from benchmarks.timing import Machine
from quant2e.files import atomic_file, write_text
from quant2e.report.algorithm_step import NOT_TRIED


def _lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *cells)]


def target_lines(targets: Sequence[Target]) -> list[str]:
    """The targets, one a line."""
    rows = [(target.what, target.wanted, target.found, target.verdict) for target in targets]
    return _lines(("", "must hold", "measured", ""), rows)


def row_lines(rows: Sequence[Row]) -> list[str]:
    """The rows, one a line."""
    heads = ("model", "scheme", "by", "accuracy", "int8 share of MACs", "SQNR dB", "CPU s", "machine", "what was done")
    return _lines(heads, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    head = (row.model, row.scheme, row.method)
    if row.failed:
        return (*head, "–", "–", "–", "–", row.instructions, f"failed: {row.failed}")
    measures = ", ".join(
        f"{name.replace('−bits', 'bits')} {_number(name, value)}" for name, value in row.measures.items()
    )
    if row.sqnr_db is None:
        return (*head, measures, "–", "–", "–", row.instructions, "")
    noise = "no error" if row.sqnr_db == math.inf else f"{row.sqnr_db:.1f}"
    numbers = (measures, f"{row.int8_share:.1%}", noise, _seconds(row.seconds))
    return (*head, *numbers, row.instructions, "; ".join(_once(row.notes)))


def _once(notes: Sequence[str]) -> list[str]:
    """What was not tried for one reason, said once: ``NAME: not tried, REASON`` are the steps of reports."""
    done, left_out = [], defaultdict[str, list[str]](list)
    for note in notes:
        name, untried, reason = note.partition(f": {NOT_TRIED}, ")
        if untried:
            left_out[reason].append(name)
        else:
            done.append(note)
    for reason, names in left_out.items():
        others = f"the other {len(names)}" if done else f"all {len(names)}"
        which = others if len(left_out) == 1 < len(names) else ", ".join(dict.fromkeys(names))
        done.append(f"{which}: {NOT_TRIED}, {reason}")
    return done


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.0f}"


def _number(name: str, value: float) -> str:
    if name == "−bits":
        return f"{-value:.4f}"
    return f"{value:.4f}" if name == "cosine" else f"{value:.2%}"


def tuned_lines(tuned: Sequence[Tuned]) -> list[str]:
    """What `tune` found, one model a line."""
    heads = (
        "model",
        "scheme",
        "goal",
        "metric",
        "float",
        "on other data",
        "int8 share",
        "trials",
        "CPU s",
        "machine",
        "exhaustive",
        "blocks",
    )
    rows = [
        (
            one.model, one.scheme, "met" if one.met else "not met", f"{one.metric:.2%}", f"{one.float_metric:.2%}",
            f"{one.test:.2%}", f"{one.int8_share:.1%}", str(one.trials), _seconds(one.seconds),
            one.instructions, f"{one.exhaustive_share:.1%} after {one.mixes} mixes", ", ".join(one.blocks),
        )
        for one in tuned
    ]  # fmt: skip
    return _lines(heads, rows)


def trained_lines(trained: Sequence[Trained]) -> list[str]:
    """Accuracies over seeds, one method a line."""
    accuracies = ("top-1, mean", "lowest", "highest")
    heads = ("model", "bits of weights", "method", "seeds", *accuracies, "CPU ms a step", "machine")
    return _lines(heads, [_trained_cells(one) for one in trained])


def _trained_cells(one: Trained) -> tuple[str, ...]:
    head = (one.model, str(one.bits), one.method)
    if one.failed:
        return (*head, "–", f"failed: {one.failed}", "–", "–", "–", one.instructions)
    mean = sum(one.top1) / len(one.top1)
    step = "–" if one.step_seconds is None else f"{1e3 * one.step_seconds:.0f}"
    accuracies = (f"{mean:.2%}", f"{min(one.top1):.2%}", f"{max(one.top1):.2%}")
    return (*head, str(len(one.top1)), *accuracies, step, one.instructions)


def write(path: Path, title: str, command: str, machines: Sequence[Machine], parts: Mapping[str, list[str]]) -> None:
    """``path`` with the ending ``.md``: each part under its heading. ``machines``: on which rows were measured."""
    lines = [f"# {title}", "", f"`{command}`", "", *(f"- {where.instructions}: {where}" for where in machines), ""]
    for heading, part in parts.items():
        lines += [f"## {heading}", "", *part, ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")


def plot(rows: Sequence[Row], path: Path) -> None:
    """One line a model and scheme, one mark a method: what is lost of the float metric; left is better.

    Raises ImportError when matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "quant2e"  # the same rows, the same file
    from matplotlib import pyplot as plt

    beside: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if not row.failed:
            beside.setdefault((row.model, row.scheme), {})[row.method] = row
    settings = {key: found for key, found in beside.items() if METHODS[0] in found}
    figure, axes = plt.subplots(figsize=(9, max(3.0, 1.2 + 0.34 * len(settings))), layout="constrained")
    markers = dict(zip(METHODS[1:], "osDP^vX", strict=False))
    for method, marker in markers.items():
        at = [(y, found) for y, found in enumerate(settings.values()) if method in found]
        lost = [_lost(found[METHODS[0]], found[method]) for _, found in at]
        axes.scatter(lost, [y for y, _ in at], label=method, marker=marker, s=36, alpha=0.8)
    axes.set_yticks(range(len(settings)), [f"{model}, {scheme}" for model, scheme in settings])
    axes.set_ylim(len(settings) - 0.5, -0.5)  # the first on top
    axes.set_xscale("symlog", linthresh=0.1)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.set_xlabel("lost of the float model's metric, in percent of it; to the left is better")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    with atomic_file(path) as part:
        figure.savefig(part, metadata={"Date": None})
    plt.close(figure)


def _lost(exact: Row, other: Row) -> float:
    wanted: Any = exact.metric
    return 100 * (wanted - other.metric) / abs(wanted)
