"""The main job: a real transformer and a real CNN become int8 programs for Inductor and for the ExecuTorch runtime.

    python -m benchmarks.demo --out demo_output

Writes ``.pt2`` and ``.pte`` files, a report per model and runtime, and everything measured as JSON and Markdown.
Prints one table. Exits with 1, and a sentence for each promise that does not hold, when quantization lost too much.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks.demo import digits, minilm
from benchmarks.demo.outcome import Outcome
from benchmarks.demo.progress import Phases
from benchmarks.demo.table import markdown, table
from benchmarks.timing import Machine, machine
from quant2e.files import write_text

MODELS = {"digits": digits.run, "minilm": minilm.run}


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for what is written")
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="only this model; may be repeated")
    return parser.parse_args(arguments)


def write(folder: Path, outcomes: list[Outcome], where: Machine, seconds: dict[str, float]) -> None:
    """Write ``demo.json`` and ``demo.md`` to ``folder``."""
    everything = {
        "machine": asdict(where),
        "models": [outcome.as_dict() for outcome in outcomes],
        "phases_s": seconds,
        "total_s": sum(seconds.values()),
    }
    write_text(folder / "demo.json", json.dumps(everything, indent=2) + "\n")
    head = f"# Float against int8\n\nMeasured by `make demo` on {where}.\n\n"
    write_text(folder / "demo.md", head + markdown(outcomes))


def main(arguments: list[str] | None = None) -> int:
    """Run the main job; return the exit code."""
    options = _arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    where = machine()
    console.print(f"machine: {where}", highlight=False, soft_wrap=True)
    with Phases(console) as phases:
        outcomes = [MODELS[name](options.out, phases) for name in options.model or MODELS]
    write(options.out, outcomes, where, phases.seconds)
    # a log has no width to fit into
    wide = console if console.is_terminal else Console(width=190)
    wide.print()
    wide.print(table(outcomes))
    for outcome in outcomes:
        console.print(f"{outcome.name}: {outcome.data}", highlight=False, soft_wrap=True)
    console.print(
        "top-1 of minilm: share of queries for which float and int8 rank the same paragraph first. "
        f"Latency: median of interleaved calls on {where.threads} thread(s), float → int8 (speed-up).",
        highlight=False,
        soft_wrap=True,
    )
    broken = [bound for outcome in outcomes for bound in outcome.failures]
    for bound in broken:
        console.print(f"NOT KEPT: {bound}", style="bold red", highlight=False, soft_wrap=True)
    kept = sum(len(outcome.bounds) for outcome in outcomes) - len(broken)
    console.print(f"{kept} of {kept + len(broken)} promises kept; files are in {options.out}/", highlight=False)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
