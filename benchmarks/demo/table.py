"""Outcomes as one table that a person can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.table import Table

from benchmarks.demo.outcome import Int8, Outcome

MEASURES = {
    "mean_cosine": ("mean cosine with float", "{:.4f}"),
    "min_cosine": ("lowest cosine with float", "{:.4f}"),
    "top1": ("top-1", "{:.2%}"),
    "top1_with_source": ("top-1, source paragraph left in", "{:.2%}"),
    "spearman": ("Spearman of similarities", "{:.4f}"),
}
"""Measures by name: how a person calls them, and how to print them."""


def _megabytes(size: int | None, float_bytes: int | None) -> str:
    if size is None:
        return "–"
    ratio = f" ({size / float_bytes:.3f} ×)" if float_bytes else ""
    return f"{size / 1e6:.2f} MB{ratio}"


Cells = Callable[[Int8], tuple[str, str]]
"""What a runtime's two columns say: the one of its Q/DQ graph, and its own."""


def _measured(name: str, form: str) -> Cells:
    def cells(column: Int8) -> tuple[str, str]:
        return form.format(column.qdq[name]), form.format(column.lowered[name])

    return cells


def _scores(column: Int8) -> tuple[str, str]:
    return ", ".join(f"{scheme} {score:.4f}" for scheme, score in column.scores.items()), ""


def _timed(place: int) -> Cells:
    def cells(column: Int8) -> tuple[str, str]:
        latency = column.latencies[place]
        return "", f"{latency.float_ms:.2f} → {latency.int8_ms:.2f} ms ({latency.speedup:.2f} ×)"

    return cells


def rows(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    """Rows for one model: a label, float, then Q/DQ graph and lowered program per runtime."""
    int8 = outcome.int8

    def row(label: str, first: str, cells: Cells) -> tuple[str, ...]:
        return (label, first, *(cell for column in int8 for cell in cells(column)))

    yield row("quantization", "float", lambda c: (c.scheme, c.scheme))
    if any(len(column.scores) > 1 for column in int8):
        yield row("  chosen by score on other data", "", _scores)
    for name, value in outcome.measures.items():
        label, form = MEASURES[name]
        yield row(label, form.format(value), _measured(name, form))
    yield row("multiply-accumulates on int8", "–", lambda c: (f"{c.int8_mac_share:.1%}", ""))
    yield row("difference from the Q/DQ graph", "", lambda c: ("", f"{c.max_steps:.3g} steps, {c.sqnr_db:.1f} dB"))
    yield row(
        "file",
        _megabytes(outcome.float_bytes, None),
        lambda c: (_megabytes(c.pt2_bytes, outcome.float_bytes), _megabytes(c.program_bytes, c.float_program_bytes)),
    )
    for place, latency in enumerate(int8[0].latencies if int8 else ()):
        yield row(latency.what, "", _timed(place))


def table(outcomes: Sequence[Outcome]) -> Table:
    """One section per model; the columns are float, then Q/DQ graph and lowered program per runtime."""
    made = Table(title="quant2e: float against int8, measured in this run", title_justify="left", show_lines=False)
    made.add_column("")
    made.add_column("float", justify="right")
    for column in outcomes[0].int8:
        made.add_column(f"Q/DQ for {column.runtime}", justify="right")
        made.add_column(column.runtime, justify="right")
    for outcome in outcomes:
        made.add_row(f"[bold]{outcome.title}[/bold]")
        for row in rows(outcome):
            made.add_row(*row)
        made.add_section()
    return made


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The same as Markdown, one table per model."""
    parts = []
    for outcome in outcomes:
        head = ["", "float", *(name for c in outcome.int8 for name in (f"Q/DQ for {c.runtime}", c.runtime))]
        lines = [f"## {outcome.title}", "", f"{outcome.data[:1].upper()}{outcome.data[1:]}.", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows(outcome)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
