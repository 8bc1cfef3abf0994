"""How prepare and convert grow with the model: ours and torchao's in turn, in one process.

``python -m benchmarks.scaling`` prints one row per size: seconds of each, their ratio, and ours per layer. Times are
CPU seconds of this process: other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import quant2e
from benchmarks.demo.record import record
from benchmarks.shapes import images, linears, resnet18
from benchmarks.timing import machine
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

Flow = Callable[[], tuple[float, float]]
"""Runs prepare, one batch and convert; returns the seconds of prepare and of convert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Median seconds; torchao's are None where it was not run."""

    name: str
    layers: int
    prepare: float
    convert: float
    peer_prepare: float | None
    peer_convert: float | None


def ours(model: nn.Module, inputs: tuple[Any, ...]) -> Flow:
    """quant2e's flow on a model that is captured once."""
    captured = quant2e.capture(model, inputs)

    def run() -> tuple[float, float]:
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        start = time.process_time()
        prepared = quant2e.prepare_pt2e(captured, quantizer)
        middle = time.process_time()
        quant2e.calibrate(prepared, [inputs])
        ready = time.process_time()
        quant2e.convert_pt2e(prepared)
        return middle - start, time.process_time() - ready

    return run


def torchao(model: nn.Module, inputs: tuple[Any, ...]) -> Flow:
    """The flow of torchao with ExecuTorch's quantizer; export does not count, but has to be repeated."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as peer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    def run() -> tuple[float, float]:
        captured = torch.export.export(model, inputs).module()
        config = peer.get_symmetric_quantization_config(is_per_channel=True)
        quantizer = peer.XNNPACKQuantizer().set_global(config)
        start = time.process_time()
        prepared = prepare_pt2e(captured, quantizer)
        middle = time.process_time()
        prepared(*inputs)
        ready = time.process_time()
        convert_pt2e(prepared)
        return middle - start, time.process_time() - ready

    return run


def measure(name: str, layers: int, model: nn.Module, inputs: tuple[Any, ...], rounds: int, peer: bool) -> Row:
    """Both flows in turn, after one round of each that does not count (the first use imports and builds)."""
    flows = [ours(model, inputs)] + ([torchao(model, inputs)] if peer else [])
    times: list[list[tuple[float, float]]] = [[] for _ in flows]
    for number in range(rounds + 1):
        for found, flow in zip(times, flows, strict=True):
            seconds = flow()
            if number:
                found.append(seconds)
    medians = [[statistics.median(part) for part in zip(*found, strict=True)] for found in times]
    other = medians[1] if peer else [None, None]
    return Row(
        name=name,
        layers=layers,
        prepare=medians[0][0],
        convert=medians[0][1],
        peer_prepare=other[0],
        peer_convert=other[1],
    )


TITLE = "prepare + convert, CPU seconds"
HEADS = ("model", "prepare", "convert", "ms per layer", "torchao prepare", "torchao convert", "torchao / ours")


def lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """One line per model, as `HEADS` says."""
    made: list[tuple[str, ...]] = []
    for row in rows:
        own = row.prepare + row.convert
        peer = None if row.peer_prepare is None or row.peer_convert is None else row.peer_prepare + row.peer_convert
        made.append(
            (
                row.name,
                f"{row.prepare:.3f}",
                f"{row.convert:.3f}",
                f"{own / row.layers * 1e3:.2f}",
                "–" if row.peer_prepare is None else f"{row.peer_prepare:.2f}",
                "–" if row.peer_convert is None else f"{row.peer_convert:.2f}",
                "–" if peer is None else f"{peer / own:.1f} ×",
            )
        )
    return made


def table(rows: list[Row]) -> Table:
    """The lines, for a terminal."""
    made = Table(title=TITLE, title_justify="left")
    for column in HEADS:
        made.add_column(column, justify="left" if column == "model" else "right")
    for line in lines(rows):
        made.add_row(*line)
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 200, 400, 800])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-up-to", type=int, default=400, help="largest chain to give to torchao; 0: never")
    parser.add_argument("--out", type=Path, help="also write PATH.md and PATH.json")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    console = Console()
    console.print(str(machine()))
    rows = []
    inputs = (torch.randn(2, 16),)
    for size in chosen.sizes:
        rows.append(measure(f"{size} linears", size, linears(size), inputs, chosen.rounds, size <= chosen.peer_up_to))
        console.print(f"{rows[-1].name} done")
    rows.append(measure("ResNet-18", 21, resnet18(), images(1), chosen.rounds, chosen.peer_up_to > 0))
    console.print(table(rows))
    if chosen.out:
        record(chosen.out, TITLE, machine(), HEADS, lines(rows))


if __name__ == "__main__":
    main()
