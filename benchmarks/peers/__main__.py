"""Ours beside its peers: latency, signal to noise, size, time to lower and memory, interleaved in one run.

``python -m benchmarks.peers`` writes ``benchmarks/results/peers.md``, ``.json`` and ``.svg``; settings (model, batch
size, threads) that are not measured again are kept from the file. Each engine is prepared in a process of its own with
a fixed number of threads, and then called in rounds, one engine after the other, while all others wait. An engine that
fails has a row that says why.

    python -m benchmarks.peers --models MobileNetV2 --batches 1 --threads 1 --rounds 5 --out /tmp/peers

OpenVINO and NNCF are installed into ``~/.cache/quant2e/openvino`` on first use; the plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.demo.progress import Phases
from benchmarks.demo.record import record
from benchmarks.peak import peak_int8
from benchmarks.peers import openvino_peer
from benchmarks.peers.models import MODELS, macs_of
from benchmarks.peers.process import Worker, WorkerError, build
from benchmarks.peers.table import HEADS, Row, lines, means, plot, sqnr_db
from benchmarks.peers.worker import Job
from benchmarks.timing import Machine, machine

RESULTS = Path(__file__).parents[1] / "results" / "peers"
TITLE = "Ours and its peers"
MODEL, TORCH = "benchmarks.peers.models", "benchmarks.peers.torch_peer"
ONNX, OPENVINO = "benchmarks.peers.onnx_peer", "benchmarks.peers.openvino_peer"
SECONDS, MOST = 0.3, 50
"""How long an engine is called in one round, and how often at most."""
PREPARE_SECONDS = 3600.0
PAUSE = 0.05
"""Seconds between two engines, in which the threads of the first stop spinning and go to sleep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """``load`` and ``build``: functions as ``module:name``; engines that compile in memory build nothing.

    ``exported``: it starts from the ONNX file of the float model, whose export counts as time to lower.
    ``builds_here``: it is built in this environment, wherever it runs.
    """

    load: str
    build: str = ""
    exported: bool = False
    builds_here: bool = False

    @property
    def python(self) -> str:
        """The interpreter that has this engine."""
        return str(openvino_peer.environment()) if self.load.startswith(OPENVINO) else sys.executable


ENGINES = {
    "float eager": Engine(load=f"{TORCH}:eager"),
    "float Inductor": Engine(load=f"{TORCH}:inductor"),
    "ours → native": Engine(load=f"{TORCH}:ours_native"),
    "ours → Inductor": Engine(load=f"{TORCH}:ours_inductor"),
    "torchao X86 → Inductor": Engine(load=f"{TORCH}:torchao"),
    "torchao X86, 7 bits → Inductor": Engine(load=f"{TORCH}:torchao_7_bit"),
    "float XNNPACK": Engine(load=f"{TORCH}:load_executorch", build=f"{TORCH}:build_executorch_float"),
    "int8 XNNPACK, ExecuTorch": Engine(load=f"{TORCH}:load_executorch", build=f"{TORCH}:build_executorch_int8"),
    "ours → ExecuTorch": Engine(load=f"{TORCH}:load_executorch", build=f"{TORCH}:build_ours_executorch"),
    "onnxruntime float": Engine(load=f"{ONNX}:load_float", exported=True),
    "onnxruntime int8": Engine(load=f"{ONNX}:load_int8", build=f"{ONNX}:build_int8", exported=True),
    "OpenVINO float": Engine(load=f"{OPENVINO}:load", build=f"{OPENVINO}:build_float", exported=True),
    "OpenVINO int8, NNCF": Engine(load=f"{OPENVINO}:load", build=f"{OPENVINO}:build_int8", exported=True),
    "ours → OpenVINO": Engine(load=f"{OPENVINO}:load", build=f"{OPENVINO}:build_ours", builds_here=True),
}
"""In the order of the columns of the plot and the rows of the table."""


@dataclass(slots=True)
class Candidate:
    """An engine that is ready to be measured, with the row that it fills."""

    row: Row
    worker: Worker
    times: list[float]


def prepare(name: str, job: Job, exported: float | WorkerError, stack: contextlib.ExitStack, log: Path) -> Candidate:
    """Build and load. Raises `WorkerError` with the reason for the table."""
    engine = ENGINES[name]
    if engine.exported and isinstance(exported, WorkerError):
        raise WorkerError(f"the float model is not exported as ONNX: {exported}")
    try:
        python = [engine.python]
    except (OSError, subprocess.SubprocessError) as error:
        raise WorkerError(f"its environment cannot be made: {error}") from error
    seconds = exported if engine.exported and isinstance(exported, float) else 0.0
    if engine.build:
        seconds += build([sys.executable] if engine.builds_here else python, job, log, PREPARE_SECONDS)
    worker = stack.enter_context(Worker(python, job, "serve", log))
    ready = worker.wait(PREPARE_SECONDS)
    seconds += 0.0 if engine.build else ready["seconds"]
    row = Row(
        model=job.model, batch=job.batch, threads=job.threads, engine=name,
        size=ready["bytes"], seconds=seconds, version=ready["version"],
    )  # fmt: skip
    return Candidate(row, worker, [])


def measure_round(candidates: Sequence[Candidate], failed: dict[str, str]) -> None:
    """Call every engine that still answers, in the order given."""
    for candidate in candidates:
        if candidate.row.engine in failed:
            continue
        try:
            found = candidate.worker.ask({"run": SECONDS, "most": MOST}, PREPARE_SECONDS)
            candidate.times.append(statistics.median(found["times"]) * 1e3)
        except WorkerError as error:
            failed[candidate.row.engine] = str(error)
        time.sleep(PAUSE)


def finish(candidate: Candidate, folder: Path) -> Row:
    """The row with its times, the output compared with the float model's, and memory."""
    path = folder / "output.npy"
    peak = candidate.worker.ask({"output": str(path)}, PREPARE_SECONDS)["peak"]
    decibels = sqnr_db(np.load(path), np.load(folder / "reference.npy"))
    return replace(candidate.row, times=tuple(candidate.times), sqnr_db=decibels, peak=peak)


def setting(job: Job, names: Sequence[str], rounds: int, exported: float | WorkerError, phases: Phases) -> list[Row]:
    """Rows for one model, batch size and number of threads."""
    failed: dict[str, str] = {}
    candidates: list[Candidate] = []
    title = f"{job.model}, batch {job.batch}, {job.threads} thread(s)"
    with contextlib.ExitStack() as stack:
        for name in names:
            engine = ENGINES[name]
            own = replace(job, engine=name, build=engine.build, load=engine.load)
            try:
                with phases.phase(f"{title}: {name}"):
                    candidates.append(prepare(name, own, exported, stack, own.file(".log")))
            except WorkerError as error:
                failed[name] = str(error)
                phases.console.print(f"          failed: {error}", highlight=False, markup=False, soft_wrap=True)
        with phases.phase(f"{title}: {rounds} rounds") as advance:
            peak = peak_int8()
        for number in range(rounds):
            # the order turns, so that no engine always runs behind the same one
            measure_round(candidates if number % 2 == 0 else candidates[::-1], failed)
            advance(number + 1, rounds)
        rows = {}
        for candidate in candidates:
            name = candidate.row.engine
            try:
                if name not in failed:
                    rows[name] = finish(candidate, job.place)
            except WorkerError as error:
                failed[name] = str(error)
    limit = macs_of(job.place) / (max(peak, peak_int8()) * job.threads) * 1e3
    rows = {name: replace(row, limit=limit) for name, row in rows.items()}
    missing = {
        name: Row(model=job.model, batch=job.batch, threads=job.threads, engine=name, failed=reason)
        for name, reason in failed.items()
    }
    return [{**rows, **missing}[name] for name in names]


def run(chosen: argparse.Namespace, folder: Path, phases: Phases) -> Iterator[list[Row]]:
    """The rows of each setting, as they are measured."""
    for model in chosen.models:
        for batch in chosen.batches:
            place = folder / f"{model}_{batch}"
            place.mkdir(parents=True, exist_ok=True)
            job = Job(engine="data", build=f"{MODEL}:write", load="", model=model, batch=batch, threads=1,
                      folder=str(place))  # fmt: skip
            with phases.phase(f"{model}, batch {batch}: data"):
                build([sys.executable], job, place / "data.log", PREPARE_SECONDS)
            exported: float | WorkerError = 0.0
            if any(ENGINES[name].exported for name in chosen.engines):
                own = replace(job, engine="onnx", build=f"{MODEL}:export")
                with phases.phase(f"{model}, batch {batch}: the float model as ONNX"):
                    exported = _build_or_reason(own, place / "onnx.log")
            for threads in chosen.threads:
                yield setting(replace(job, threads=threads), chosen.engines, chosen.rounds, exported, phases)


def _build_or_reason(job: Job, log: Path) -> float | WorkerError:
    try:
        return build([sys.executable], job, log, PREPARE_SECONDS)
    except WorkerError as error:
        return error


def kept(path: Path, where: Machine) -> dict[tuple[Any, ...], Row]:
    """Rows of an earlier run on the same processor, with the same instructions."""
    stored = path.with_suffix(".json")
    if not stored.exists():
        return {}
    data = json.loads(stored.read_text())
    if any(data["machine"][name] != getattr(where, name) for name in ("cpu", "isa", "vnni")):
        return {}
    return {(*row.setting, row.engine): row for row in map(Row.from_plain, data["rows"])}


def in_order(rows: dict[tuple[Any, ...], Row]) -> list[Row]:
    """Rows by model, batch, threads and engine, as they are listed here."""
    engines = list(ENGINES)
    return sorted(rows.values(), key=lambda r: (MODELS.index(r.model), r.batch, r.threads, engines.index(r.engine)))


def write(path: Path, rows: Sequence[Row], where: Machine) -> None:
    """The table for people and for programs, with the geometric means above it."""
    versions = ", ".join(sorted({row.version for row in rows if row.version}))
    more = [f"Engines: {versions}. Milliseconds are medians of interleaved rounds, ratios medians over rounds.", ""]
    more += [f"- {mean}" for mean in means(rows)]
    data = [row.plain() for row in rows]
    title = f"{TITLE}, on {where.isa}{' with VNNI' if where.vnni else ' without VNNI'}"
    record(path, title, where, HEADS, list(lines(rows)), data=data, more="\n".join(more))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS, help="PATH.md, PATH.json and PATH.svg")
    parser.add_argument("--keep", type=Path, help="folder for data and programs, to be used again (default: temporary)")
    chosen = parser.parse_args(arguments)
    where, console = machine(), Console()
    console.print(str(where), highlight=False)
    rows = kept(chosen.out, where)
    with tempfile.TemporaryDirectory(prefix="peers_") as temporary, Phases(console) as phases:
        for found in run(chosen, chosen.keep or Path(temporary), phases):
            again = {row.setting for row in found}  # rows of two runs are not neighbours in time
            rows = {key: row for key, row in rows.items() if row.setting not in again}
            rows |= {(*row.setting, row.engine): row for row in found}
            write(chosen.out, in_order(rows), where)
    try:
        plot(in_order(rows), chosen.out.with_suffix(".svg"))
    except ImportError as error:
        console.print(f"no plot: {error}; pip install 'quant2e[bench]'", markup=False)
    for mean in means(in_order(rows)):
        console.print(str(mean), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
