"""The page of the zoo, ``docs/zoo.md``: written from its rows, never by hand."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from quant2e.files import atomic_file
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.row import Quantized, Row

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"

HEAD = """# The zoo

Architectures with random weights, small, each through capture, two quantizers, a file, ExecuTorch and ONNX, some
through Inductor as well. Written by `make zoo UPDATE=1` from what a run gave; `make zoo` compares a run with these
rows, and so do the slow tests (`tests/zoo/`). What changes, for better or worse, fails until it is stored.

- Both quantizers are set to `w8a8`, and to `w8a8-dynamic` where the family says "at run time".
- *sizes*: those that vary; the results are run with others than the example's, too.
- *dB*: SQNR of the quantized outputs against float on data that was not calibrated on; behind a slash, with other
  sizes. Weights are random, so that this says what is broken, not what a trained model keeps.
- *int8*: share of the multiply-accumulates that compute on integers; – where there are none.
- *ExecuTorch*: delegates, and the ops left to kernels; *ONNX*: onnxruntime's integer kernels, and the products that
  stay float; *Inductor*: int8 kernels, and the quantized ops that compute in float. Each program agrees with its Q/DQ
  graph within the bound of `lowering.verify`. ExecuTorch gets XNNPACK's graph, the others x86's, which is quantized
  for a processor without VNNI.
- A number in brackets names a reason below the table; … is a target that did not run yet. Every file computed the same
  bits as what was saved.
"""


def _db(one: Quantized) -> str:
    shown = "exact" if one.sqnr_db is None else f"{one.sqnr_db:.1f}"
    return shown if one.other_db is None else f"{shown} / {one.other_db:.1f}"


def _share(one: Quantized) -> str:
    return "–" if one.share is None else f"{one.share:.1%}".replace("100.0%", "100%")


def _quantized(one: Quantized, letters: Letters) -> list[str]:
    return [letters.of(one.refused), ""] if one.refused else [_db(one), _share(one)]


def _lowered(row: Row, target: str, letters: Letters) -> str:
    if (one := row.targets.get(target)) is None:
        return "" if target == "Inductor" else "…"
    return letters.of(one.refused) if one.refused else f"{one.parts} + {one.kernels}"


class Letters:
    """Reasons, in the order in which they are met, and the label of each."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def of(self, reason: str) -> str:
        """The label of a reason."""
        return self.reasons.setdefault(reason, f"({len(self.reasons) + 1})")


def text(rows: Sequence[Row]) -> str:
    """The page."""
    letters, lines = Letters(), []
    for row in rows:
        one, other = (_quantized(row.quantizers[name], letters) for name in ("XNNPACK", "x86"))
        targets = [_lowered(row, name, letters) for name in ("ExecuTorch", "ONNX", "Inductor")]
        cells = [row.name, row.family, f"{row.parameters:,}", ", ".join(row.varying), *one, *other, *targets]
        lines.append(f"| {' | '.join(cells)} |")
    varying = sum(bool(row.varying) for row in rows)
    compiled = sum("Inductor" in row.targets for row in rows)
    head = (
        "| architecture | family | parameters | sizes | XNNPACK dB | int8 | x86 dB | int8 | ExecuTorch | ONNX "
        "| Inductor |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    parts = [
        HEAD,
        f"{len(rows)} of {len(ARCHITECTURES)} ran, {varying} with sizes that vary, {compiled} through Inductor.\n",
        head,
    ]
    parts += [*lines, "", *_reasons("What was refused, and why", {v: k for k, v in letters.reasons.items()})]
    return "\n".join([*parts, *_float_work(rows)]).rstrip() + "\n"


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


def _reasons(title: str, reasons: dict[str, str]) -> list[str]:
    if not reasons:
        return []
    table = [f"| {_cell(label)} | {_cell(reason)} |" for label, reason in reasons.items()]
    return [f"## {title}\n", "| | reason |", "|---|---|", *table, ""]


def _float_work(rows: Sequence[Row]) -> list[str]:
    found: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        for name, one in row.quantizers.items():
            for reason, count in one.float_work.items():
                found[name, reason] += count
                where[name, reason].append(row.name)
    table = [
        f"| {name} | {count} | {_cell(reason)} | {', '.join(where[name, reason])} |"
        for (name, reason), count in sorted(found.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
    ]
    return [
        "## Products that stay float, and why\n",
        "| quantizer | ops | reason | in |",
        "|---|---|---|---|",
        *table,
        "",
    ]


def cells(row: Row) -> list[str]:
    """A row for the screen, a line for each quantizer and target."""
    lines = [
        f"{name}: {one.refused}" if one.refused else f"{name}: {_db(one)} dB, int8 {_share(one)}, {one.saved}"
        for name, one in row.quantizers.items()
    ]
    return lines + [
        f"{name}: {one.refused}" if one.refused else f"{name}: {one.parts} + {one.kernels}, {one.sqnr_db} dB"
        for name, one in row.targets.items()
    ]


def write(rows: Sequence[Row], path: Path = PAGE) -> None:
    """Write the page."""
    with atomic_file(path) as part:
        part.write_text(text(rows), encoding="utf-8")
