"""What a calibration batch costs over the float forward: float, ours and torchao's in turn, in one process.

``python -m benchmarks.calibration`` prints one row per model and batch size: the float forward in milliseconds, and
the ratio to it of one observed batch with min-max and with histogram observers. Float is the model as its author wrote
it. With one thread times are CPU time of this process, so that other programs do not count; with more, wall time.
``--memory`` prints the peak memory of a calibration above that of the float forward instead, each in a process of
its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx import GraphModule

import quant2e
from benchmarks.shapes import SHAPES
from benchmarks.timing import machine
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

Call = Callable[[], object]
KINDS = ("min-max", "histogram")


def ours(model: nn.Module, inputs: tuple[Any, ...], kind: str) -> GraphModule:
    """The prepared model, for `quant2e.calibrate`."""
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


def ratios(model: nn.Module, inputs: tuple[Any, ...], kind: str, rounds: int, peer: bool) -> list[float]:
    """Milliseconds of the float forward, then medians of our and torchao's batch relative to it.

    One run of `quant2e.calibrate` pulls its batches from a generator that times the others in between.
    """
    others: list[Call] = [lambda: model(*inputs)] + ([torchao(model, inputs, kind)] if peer else [])
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in range(len(others) + 1)]

    def batches() -> Iterator[tuple[Any, ...]]:
        for number in range(rounds + 1):
            for place, call in enumerate(others):
                start = now()
                call()
                if number:
                    times[place].append(now() - start)
            start = now()
            yield inputs
            if number:
                times[-1].append(now() - start)

    quant2e.calibrate(ours(model, inputs, kind), batches())
    medians = [statistics.median(found) for found in times]
    return [medians[0] * 1e3, medians[-1] / medians[0], *(median / medians[0] for median in medians[1:-1])]


def measure(name: str, batch: int, rounds: int, peer: bool) -> list[str]:
    """A row: milliseconds of float, our ratio and torchao's for each kind."""
    make, make_inputs = SHAPES[name]
    model, inputs = make(), make_inputs(batch)
    found = [ratios(model, inputs, kind, rounds, peer) for kind in KINDS]
    columns = [f"{one[place]:.2f}" if place < len(one) else "–" for place in (1, 2) for one in found]
    return [name, str(batch), f"{statistics.mean(one[0] for one in found):.1f}", *columns]


def _peak(name: str, batch: int, kind: str, answer: Any) -> None:
    make, make_inputs = SHAPES[name]
    model, inputs = make(), make_inputs(batch)
    prepared = None if kind == "float" else ours(model, inputs, kind)
    with torch.no_grad():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if prepared is None:
            for _ in range(3):
                model(*inputs)
        else:
            quant2e.calibrate(prepared, [inputs] * 3)
    answer.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def memory(name: str, batch: int) -> list[str]:
    """A row: growth of the peak resident memory, in MB, by three batches of float and of each kind."""
    context = multiprocessing.get_context("spawn")
    found = []
    for kind in ("float", *KINDS):
        answer = context.Queue()
        process = context.Process(target=_peak, args=(name, batch, kind, answer))
        process.start()
        found.append(answer.get())
        process.join()
    return [name, str(batch), *(f"{value:.0f}" for value in found)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-peer", action="store_true", help="leave torchao out")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(chosen.threads)
    torch.set_grad_enabled(False)
    console = Console()
    console.print(str(machine()))
    heads = ["model", "batch", "float MB", *(f"{kind} MB" for kind in KINDS)]
    if not chosen.memory:
        heads = ["model", "batch", "float ms", *KINDS, *(f"torchao {kind}" for kind in KINDS)]
    made = Table(*heads, title="one calibration batch, relative to the float forward", title_justify="left")
    for name in chosen.models:
        for batch in chosen.batches:
            row = memory(name, batch) if chosen.memory else measure(name, batch, chosen.rounds, not chosen.without_peer)
            made.add_row(*row)
            console.print(" ".join(row))
    console.print(made)


if __name__ == "__main__":
    main()
