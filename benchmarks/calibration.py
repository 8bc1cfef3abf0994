"""What a calibration batch costs over the float forward: float, ours and torchao's in turn, in one process.

``python -m benchmarks.calibration`` prints one row per model and batch size: the float forward in milliseconds, and
the ratio to it of one observed batch with min-max and with histogram observers, of ours, of ours with ``compiled=True``
(when ``--compiled`` is given) and of torchao's. Float is the model as its author wrote it; "folded" is the captured
graph that is observed, its batch norms folded, without observers: what observing alone costs shows against it. With
one thread times are CPU time of this process, so that other programs do not count; with more, wall time. ``--memory``
prints the peak memory of a calibration above that of the float forward instead, each in a process of its own.
``--out`` also writes the table as Markdown and JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx import GraphModule

import quant2e
from benchmarks.demo.record import record
from benchmarks.shapes import SHAPES
from benchmarks.timing import machine
from quant2e.calibration.compiled import compiled_graph
from quant2e.observers.native import ops as native
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

Call = Callable[[], object]
KINDS = ("min-max", "histogram")


def ours(model: nn.Module, inputs: tuple[Any, ...], kind: str) -> GraphModule:
    """The prepared model: calling it is what `quant2e.calibrate` does with a batch."""
    config = get_symmetric_quantization_config(is_per_channel=True)
    if kind == "min-max":
        spec = replace(config.input_activation, observer_or_fake_quant_ctr=quant2e.MinMaxObserver)
        config = replace(config, input_activation=spec, output_activation=spec)
    return quant2e.prepare_pt2e(quant2e.capture(model, inputs), XNNPACKQuantizer().set_global(config))


def torchao(model: nn.Module, inputs: tuple[Any, ...], kind: str) -> Call:
    """One batch through a model that torchao prepared."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as peer
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    config = peer.get_symmetric_quantization_config(is_per_channel=True)
    if kind == "min-max":
        spec = replace(config.input_activation, observer_or_fake_quant_ctr=MinMaxObserver)
        config = replace(config, input_activation=spec, output_activation=spec)
    captured = torch.export.export(model, inputs).module()
    prepared = prepare_pt2e(captured, peer.XNNPACKQuantizer().set_global(config))
    return lambda: prepared(*inputs)


def folded(model: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    """The graph that is observed, without observers."""
    prepared = ours(model, inputs, KINDS[0])
    for node in list(prepared.graph.nodes):
        if node.op == "call_module":
            node.replace_all_uses_with(node.args[0])
            prepared.graph.erase_node(node)
    prepared.recompile()
    return prepared


def compiled(model: nn.Module, inputs: tuple[Any, ...], kind: str) -> Call:
    """One batch as `quant2e.calibrate` runs it with ``compiled=True``; the first call compiles."""
    run = compiled_graph(ours(model, inputs, kind))
    return lambda: run(*inputs)


def times_of(calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of each, called in turn, after one round that does not count."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = now()
            call()
            if number:
                found[name].append(now() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def measure(name: str, batch: int, rounds: int, peer: bool, with_compiled: bool) -> dict[str, str]:
    """A row: milliseconds of the float forward, and everything else relative to it."""
    native.load_ops()  # as `calibrate` does
    make, make_inputs = SHAPES[name]
    model, inputs = make(), make_inputs(batch)
    bare = folded(model, inputs)
    calls: dict[str, Call] = {"float": lambda: model(*inputs), "folded": lambda: bare(*inputs)}
    for kind in KINDS:
        prepared = ours(model, inputs, kind)
        calls[kind] = lambda prepared=prepared: prepared(*inputs)  # type: ignore[misc]
    for kind in KINDS if with_compiled else ():
        calls[f"{kind} compiled"] = compiled(model, inputs, kind)
    for kind in KINDS if peer else ():
        calls[f"{kind} torchao"] = torchao(model, inputs, kind)
    found = times_of(calls, rounds)
    row = {"model": name, "batch": str(batch), "float ms": f"{found['float'] * 1e3:.1f}"}
    return row | {key: f"{value / found['float']:.2f}" for key, value in found.items() if key != "float"}


def _resident(kind: str) -> float:
    """MB of this process in memory, by Linux: ``VmRSS``, now, or ``VmHWM``, the most since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 1024


def _peak(name: str, batch: int, kind: str, answer: Any) -> None:
    make, make_inputs = SHAPES[name]
    model, inputs = make(), make_inputs(batch)
    prepared = None if kind == "float" else ours(model, inputs, kind)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of making the model is another matter
    before = _resident("VmRSS")
    with torch.no_grad():
        if prepared is None:
            for _ in range(3):
                model(*inputs)
        else:
            quant2e.calibrate(prepared, [inputs] * 3)
    answer.put(_resident("VmHWM") - before)


def memory(name: str, batch: int) -> dict[str, str]:
    """A row: growth of the peak resident memory, in MB, by three batches of float and of each kind."""
    context = multiprocessing.get_context("spawn")
    row = {"model": name, "batch": str(batch)}
    for kind in ("float", *KINDS):
        answer = context.Queue()
        process = context.Process(target=_peak, args=(name, batch, kind, answer))
        process.start()
        row[f"{kind} MB"] = f"{answer.get():.0f}"
        process.join()
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="also measure calibrate(compiled=True)")
    parser.add_argument("--without-peer", action="store_true", help="leave torchao out")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--out", type=Path, help="also write PATH.md and PATH.json")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(chosen.threads)
    torch.set_grad_enabled(False)
    console = Console()
    console.print(str(machine()))
    rows = []
    for name in chosen.models:
        for batch in chosen.batches:
            if chosen.memory:
                rows.append(memory(name, batch))
            else:
                rows.append(measure(name, batch, chosen.rounds, not chosen.without_peer, chosen.compiled))
            console.print(" ".join(rows[-1].values()))
    what = (
        "peak memory of three calibration batches" if chosen.memory else "one calibration batch over the float forward"
    )
    lines = [list(row.values()) for row in rows]
    made = Table(*rows[0], title=what, title_justify="left")
    for line in lines:
        made.add_row(*line)
    console.print(made)
    if chosen.out:
        record(chosen.out, what, machine(), list(rows[0]), lines)


if __name__ == "__main__":
    main()
