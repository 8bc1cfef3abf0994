"""Where the time of a compiled model goes, beside what its products would take at the best rate of their kernels.

``python -m benchmarks.peers.profile`` writes ``benchmarks/results/peers_profile.md`` and ``.json``: for the models of
``benchmarks.peers.__main__``, on one thread, what torch's profiler says of the program of float Inductor, of ours and
of torchao's. Products are linear layers, convolutions and attention; "other ops" are calls of torch between them; the
rest is code that Inductor generated and the Python between the calls. The best rate is that of
``onednn.qlinear_pointwise``, and of a float ``linear``, on square matrices in the same run: the bound is the time of
all multiply-accumulates at that rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import quant2e
from benchmarks.demo.progress import Phases
from benchmarks.demo.record import record
from benchmarks.peers import torch_peer
from benchmarks.peers.models import MODELS, inputs_of, model_of
from benchmarks.peers.process import build
from benchmarks.peers.worker import Job
from benchmarks.timing import machine
from lowering.inductor.kernels.engines import Engine, Float, OneDnn, Product, timed
from quant2e.files import write_text
from quant2e.report.macs import count_macs

RESULTS = Path(__file__).parents[1] / "results" / "peers_profile"
TITLE = "Where the time goes"
HEADS = (
    "model", "batch", "engine", "ms", "products ms", "calls", "other ops ms", "generated and between ms", "GMAC",
    "GMAC/s in products", "of the best rate", "bound ms",
)  # fmt: skip
ENGINES = {
    "float Inductor": torch_peer.inductor,
    "ours → Inductor": torch_peer.ours_inductor,
    "torchao X86, 7 bits → Inductor": torch_peer.torchao_7_bit,
}
PRODUCTS = (
    "onednn::q", "mkldnn::_convolution", "mkldnn::_linear", "mkl::_mkl_linear", "aten::addmm", "aten::mm", "aten::bmm",
)  # fmt: skip
CALLS = 20
SIDE = 1024
"""Rows, inputs and outputs of the product whose rate counts as the best."""


def best_rate(*, int8: bool) -> float:
    """Multiply-accumulates in a second of a square product on one thread: the fastest of several calls."""
    engine: Engine = OneDnn() if int8 else Float()
    square = Product(x=(SIDE, SIDE), weight=(SIDE, SIDE), bias=False, integers=int8, float_rows=not int8, group=SIDE)
    return float(SIDE**3 / min(timed((engine,), square)[engine.name] for _ in range(CALLS)))


def measure(job: Job) -> None:
    """Profile one engine in this process and write what was found beside the job."""
    torch.set_num_threads(job.threads)
    with torch.no_grad():
        graph = quant2e.capture(model_of(job), inputs_of(job.place))
        macs = sum(count_macs(node) for node in graph.graph.nodes)
        call = ENGINES[job.engine](job).call
        times = []
        for _ in range(CALLS + 5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            for _ in range(CALLS):
                call()
        rate = best_rate(int8=job.engine != "float Inductor")
    groups = {"products": 0.0, "other ops": 0.0, "rest": 0.0}
    calls = 0
    for event in profiled.key_averages():
        product = event.key.startswith(PRODUCTS)
        calls += event.count if product else 0
        group = "products" if product else "other ops" if "::" in event.key else "rest"
        groups[group] += event.self_cpu_time_total
    found = {"seconds": statistics.median(times[5:]), "macs": macs, "rate": rate, "calls": calls // CALLS} | groups
    write_text(job.file(".profile.json"), json.dumps(found))


def row(job: Job, found: dict[str, Any]) -> list[str]:
    """A line of the table. The profiler slows calls down: its parts are scaled to the time without it."""
    ms = found["seconds"] * 1e3
    parts = {name: found[name] for name in ("products", "other ops", "rest")}
    scale = ms / sum(parts.values())
    speed = found["macs"] / (parts["products"] * scale / 1e3)
    return [
        job.model, str(job.batch), job.engine, f"{ms:.2f}", f"{parts['products'] * scale:.2f}", str(found["calls"]),
        f"{parts['other ops'] * scale:.2f}", f"{parts['rest'] * scale:.2f}", f"{found['macs'] / 1e9:.2f}",
        f"{speed / 1e9:.0f}", f"{speed / found['rate']:.0%}", f"{found['macs'] / found['rate'] * 1e3:.2f}",
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--out", type=Path, default=RESULTS, help="PATH.md and PATH.json")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    where, rows = machine(), []
    with tempfile.TemporaryDirectory(prefix="peers_profile_") as folder, Phases(Console()) as phases:
        for model in chosen.models:
            for batch in chosen.batches:
                place = Path(folder) / f"{model}_{batch}"
                place.mkdir()
                data = Job(engine="data", build="benchmarks.peers.models:write", load="", model=model, batch=batch,
                           threads=1, folder=str(place))  # fmt: skip
                build([sys.executable], data, place / "log", 3600)
                for engine in ENGINES:
                    job = Job(engine=engine, build="benchmarks.peers.profile:measure", load="", model=model,
                              batch=batch, threads=1, folder=str(place))  # fmt: skip
                    with phases.phase(f"{model}, batch {batch}: {engine}"):
                        build([sys.executable], job, place / "log", 3600)
                    rows.append(row(job, json.loads(job.file(".profile.json").read_text())))
    record(chosen.out, TITLE, where, HEADS, rows)


if __name__ == "__main__":
    main()
