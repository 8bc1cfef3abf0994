"""``python -m benchmarks.weight_only``: every program of every library, called in turn in one process.

One table: milliseconds (median and least), tokens per second by the median, and SQNR of the logits against the float
model. ``rows`` says what the weights are multiplied by: int8 rows change numbers, so compare with equal rows. Libraries
that are not installed are left out, by name; ``benchmarks/README.md`` says what to install. ``--out`` also writes the
table as Markdown and JSON.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.demo.record import record
from benchmarks.timing import machine
from benchmarks.weight_only import ggml_peer, onnxruntime_peer, openvino_peer, ours
from benchmarks.weight_only.decoders import SIZES, VOCABULARY, Call, Decoder, Program, decoder, weights_of
from quant2e.accuracy.output_error import powers
from quant2e.ranges.sqnr import sqnr_db

LIBRARIES: Mapping[str, Callable[[Decoder, Tensor], Iterator[Program]]] = {
    "quant2e": ours.programs,
    "openvino": openvino_peer.programs,
    "onnxruntime": onnxruntime_peer.programs,
    "ggml": ggml_peer.programs,
}
HEADS = ("model", "threads", "library", "weights", "rows", "ms", "least ms", "tokens/s", "dB")


def bandwidth() -> float:
    """Bytes per second of reading memory, on as many threads as torch uses: the sum of 256 MiB of floats."""
    block = torch.ones(1 << 26)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best


def build(names: Iterable[str], model: Decoder, ids: Tensor) -> Iterator[Program]:
    """The programs of the libraries that are there."""
    for name in names:
        try:
            yield from LIBRARIES[name](model, ids)
        except ModuleNotFoundError as missing:
            print(f"{name} is left out: {missing}")
        gc.collect()


def seconds_of(calls: Mapping[str, Call], rounds: int, at_most: float) -> dict[str, list[float]]:
    """Seconds of each call, in turn, after one round that counts only for calls of more than ``at_most`` seconds; one
    that has taken as long of its own rests.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in calls if number % 2 else reversed([*calls]):
            if sum(found[name]) > at_most:
                continue
            start = time.perf_counter()
            calls[name]()
            taken = time.perf_counter() - start
            if number or taken > at_most:
                found[name].append(taken)
    return found


def measure(size: str, tokens: int, chosen: argparse.Namespace) -> Iterator[tuple[list[list[str]], str]]:
    """For each number of threads the rows of one model, and what people read above them."""
    model = decoder(size)
    ids = torch.randint(0, VOCABULARY, (1, tokens))
    wanted, count = model(ids), weights_of(model)
    name = f"{count / 1e6:.0f} M" + (f", {tokens} tokens" if tokens > 1 else "")
    programs = list(build(chosen.libraries, model, ids))
    del model
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        calls = {program.name: program.on(threads) for program in programs}
        noise = {each: sqnr_db(*powers(wanted, call().clone())) for each, call in calls.items()}
        seconds = seconds_of(calls, chosen.rounds, chosen.seconds)
        rows = []
        for program in programs:
            times = seconds[program.name]
            middle = statistics.median(times)
            numbers = (middle * 1e3, min(times) * 1e3, tokens / middle, noise[program.name])
            texts = [f"{value:.{digits}f}" for value, digits in zip(numbers, (2, 2, 0, 1), strict=True)]
            rows.append([name, str(threads), program.library, program.weights, program.rows, *texts])
        speed = bandwidth()
        limits = (f"{text} {count * each / speed * 1e3:.2f} ms" for text, each in (("4 bits", 0.594), ("8 bits", 1)))
        yield (
            rows,
            f"{name}, {threads} thread(s): memory reads {speed / 1e9:.1f} GB/s: at the least {', '.join(limits)}.",
        )


def _versions() -> str:
    names = ("openvino", "nncf", "onnxruntime", "libggml-python")
    return ", ".join(f"{name} {version(name)}" for name in names if _is_there(name)) + "."


def _is_there(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["medium", "large"], choices=list(SIZES))
    parser.add_argument("--tokens", type=int, nargs="*", default=[1])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--libraries", nargs="*", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one program, at the most")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    torch.set_grad_enabled(False)
    console = Console(width=200)
    console.print(str(machine()))
    lines: list[list[str]] = []
    notes: list[str] = []
    for size in chosen.sizes:
        for tokens in chosen.tokens:
            for rows, note in measure(size, tokens, chosen):
                for line in rows:
                    console.print(" | ".join(line))
                console.print(note)
                lines += rows
                notes.append(note)
                gc.collect()
    if chosen.out:
        title = "one step of a decoder, weight-only, beside other libraries"
        record(chosen.out, title, machine(), HEADS, lines, more=" ".join([*notes, _versions()]))


if __name__ == "__main__":
    main()
