"""Benchmark workers: a program is loaded into a fresh process, and may end it."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowering.bench.inputs import described, read_bench_inputs
from lowering.files.program_file import OpenProgram, opened, read_program
from quant2e.errors import FileFormatError, LoweringError, Quant2eError
from quant2e.isolation import unheard

_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PRELOADED = ["lowering.bench.worker", "executorch.runtime", "executorch.kernels.quantized"]
"""Imported once, by the process that all others are forked from; it runs nothing, so no threads are lost in a fork."""

WARM_UP = 3
SECONDS, LEAST, MOST = 2.0, 9, 200
"""How long each program is called when the number of rounds is not given, and how often at least and at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """``load_ms``: from the bytes of a file (a ``.pt2``: from the file) to a program that can be called.

    ``peak_mb``: by how much reading, loading and running it raised the process's peak of resident memory, in 10⁶ bytes.
    ``unchanged``: the file carries a checksum, and matches it. ``inputs``: what it was run on, dtypes and sizes.
    """

    load_ms: float
    peak_mb: float
    unchanged: bool = False
    inputs: str = ""


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of this module in a new process and return what it returns; its errors are raised here."""
    context: Any = multiprocessing.get_context(_START)
    if _START == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
        with unheard("starting the process that others are forked from"):  # it, and they, keep this standard error
            forkserver.ensure_running()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, function, args))
    process.start()
    sending.close()
    try:
        good, value = receiving.recv()
    except EOFError:
        process.join()
        paths = [path for arg in args for path in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(path, Path)]
        named = ", ".join(map(str, paths)) or "the programs"
        if process.exitcode is not None and process.exitcode < 0:  # by a signal: a runtime that crashed
            name = signal.Signals(-process.exitcode).name
            raise FileFormatError(
                f"the process that ran {named} was ended by {name}: damaged, or made for another runtime"
            ) from None
        raise LoweringError(
            f"the process that ran {named} ended without an answer (exit code {process.exitcode})"
        ) from None
    except BaseException:  # Ctrl-C, say: nobody waits for the answer any more
        process.kill()
        process.join()
        raise
    process.join()
    if not good:
        raise value
    return value


def _answer(pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, function(*args)))
    except (Quant2eError, OSError) as error:
        pipe.send((False, error))


def measure_footprint(path: Path, inputs: Path | None, method: str | None, threads: int) -> Footprint:
    """Load a program and call it `WARM_UP` times."""
    _use(threads, [path])
    gc.collect()
    before = _peak()
    source = read_program(path, native=True)
    start = time.perf_counter()
    program = opened(source, method)
    load_ms = (time.perf_counter() - start) * 1e3
    tensors = _tensors(program, inputs)
    for _ in range(WARM_UP):
        program.run(tensors)
    return Footprint(
        load_ms=load_ms, peak_mb=(_peak() - before) / 1e6, unchanged=program.unchanged, inputs=described(tensors)
    )


def measure_times(
    paths: Sequence[Path], inputs: Sequence[Path | None], method: str | None, threads: int, rounds: int | None
) -> list[list[float]]:
    """Seconds of each call, a list per program of one length; neighbours in time at the same place.

    ``inputs``: a file for each program; None: its own.
    """
    _use(threads, paths)
    programs = [opened(read_program(path, native=True), method) for path in paths]
    calls = [(program, _tensors(program, file)) for program, file in zip(programs, inputs, strict=True)]
    for program, tensors in calls * WARM_UP:
        program.run(tensors)
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + SECONDS * len(calls)
    while not _enough(len(times[0]), rounds, end):
        # the order turns, so that no program always runs behind the same one
        for place in sorted(range(len(calls)), reverse=len(times[0]) % 2 == 1):
            program, tensors = calls[place]
            start = time.perf_counter()
            program.call(tensors)
            times[place].append(time.perf_counter() - start)
    return times


def _enough(done: int, rounds: int | None, end: float) -> bool:
    if rounds is not None:
        return done >= rounds
    return done >= MOST or (done >= LEAST and time.perf_counter() > end)


def _use(threads: int, paths: Sequence[Path]) -> None:
    torch.set_num_threads(threads)
    if any(path.suffix == ".pte" for path in paths):
        # before a program is loaded: it keeps the pool it finds
        from lowering.executorch.runtime import set_threads

        set_threads(threads)


def _tensors(program: OpenProgram, inputs: Path | None) -> tuple[Tensor, ...]:
    return read_bench_inputs(inputs) if inputs is not None else program.tensors()


def _peak() -> int:
    """Peak of resident memory so far, in bytes; Linux counts in kilobytes, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
