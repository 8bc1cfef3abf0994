"""The zoo: ``python -m tests.zoo [NAME …] [--update] [--missing] [--targets TARGET …] [--list]``.

Every architecture, or those named, through everything, a line each. ``--update`` stores the rows and writes
``docs/zoo.md``, after each; without it they are compared with what is stored, and the exit status is the number of rows
that differ. ``--missing`` runs what has no stored row, or a target that did not run yet, and that target only.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import replace

import torch

from tests.zoo import page
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.row import Row, differences, read, write
from tests.zoo.run import TARGETS, targets_of, visit, wrong


def main() -> int:
    """Run the zoo; returns how many rows are wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; all without")
    parser.add_argument("--update", action="store_true", help="store the rows and write docs/zoo.md")
    parser.add_argument("--missing", action="store_true", help="only what did not run yet")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS), help="only these")
    parser.add_argument("--list", action="store_true", help="print the names")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.names) - ARCHITECTURES.keys()):
        parser.error(f"no architecture is called {', '.join(unknown)}: --list prints the names")
    if asked.list:
        print("\n".join(ARCHITECTURES))
        return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, bad = read(), 0
    for name in asked.names or ARCHITECTURES:
        stored = rows.get(name)
        targets = [target for target in asked.targets if target in targets_of(ARCHITECTURES[name])]
        if asked.missing and stored is not None:
            targets = [target for target in targets if target not in stored.targets]
            if not targets:
                continue
        began, processor = time.monotonic(), time.process_time()
        row = visit(ARCHITECTURES[name], targets)
        complaints = list(wrong(ARCHITECTURES[name], row))
        if not asked.update:
            complaints += _compared(stored, row)
        elif not row.crashes:
            rows[name] = row if stored is None else replace(row, targets={**stored.targets, **row.targets})
            _store(rows)
        bad += bool(complaints)
        print(f"{name}: {time.monotonic() - began:.1f} s, {time.process_time() - processor:.1f} s of CPU", flush=True)
        print("".join(f"    {line}\n" for line in (*page.cells(row), *complaints)), end="", flush=True)
    return bad


def _compared(stored: Row | None, found: Row) -> list[str]:
    if stored is None:
        return ["it has no stored row"]
    return list(
        differences(
            replace(stored, targets={name: one for name, one in stored.targets.items() if name in found.targets}), found
        )
    )


def _store(rows: dict[str, Row]) -> None:
    kept = [rows[name] for name in ARCHITECTURES if name in rows]
    write(kept)
    page.write(kept)


if __name__ == "__main__":
    sys.exit(main())
