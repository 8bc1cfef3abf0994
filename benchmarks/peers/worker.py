"""One engine in a process of its own: it prepares a model there, and runs it as often as the parent asks.

``python -m benchmarks.peers.worker JOB.json build|serve``. The parent speaks JSON lines over stdin and stdout; whatever
the engine prints goes to stderr. Standard library and numpy only, so that it runs in the environment of any engine.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

ONNX = "model.onnx"
"""The float model, in the folder of a model and batch size."""

TRANSFORMERS = ("BERT-base", "MiniLM")
"""Models that are quantized dynamically where the choice exists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to prepare. ``build`` and ``load``: functions as ``module:name``; ``build`` is empty for engines without
    files.

    ``folder``: of the model and batch size: the data, and what engines build.
    """

    engine: str
    build: str
    load: str
    model: str
    batch: int
    threads: int
    folder: str

    @property
    def place(self) -> Path:
        """The folder as a path."""
        return Path(self.folder)

    def file(self, suffix: str) -> Path:
        """A file of this engine in the folder; the same for every number of threads."""
        name = "".join(c if c.isalnum() else "_" for c in self.engine)
        return self.place / f"{name}{suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A program that is ready. ``call``: run it once on the inputs of the folder; returns the outputs.

    ``first``: those outputs' first tensor as an array. ``version``: of the engine. ``files``: that hold the program.
    ``seconds``: from the float model to a program, of engines that build no files.
    """

    call: Callable[[], Any]
    first: Callable[[Any], np.ndarray]
    version: str
    files: tuple[Path, ...] = ()
    seconds: float = 0.0


def arrays(path: Path) -> tuple[np.ndarray, ...]:
    """The arrays of an ``.npz`` file in their order."""
    with np.load(path, allow_pickle=False) as found:
        return tuple(found[name] for name in found.files)


def calibration(folder: Path) -> list[tuple[np.ndarray, ...]]:
    """The batches to calibrate on."""
    return [arrays(path) for path in sorted(folder.glob("calibration_*.npz"))]


def timed(call: Callable[[], object], seconds: float, most: int) -> list[float]:
    """Seconds of each of several calls: for about ``seconds``, at least one; one more before them does not count."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or (time.perf_counter() < end and len(times) < most):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def answer(program: Loaded, request: Mapping[str, Any]) -> dict[str, Any]:
    """What the parent asked for: times, or the output in a file, with the peak of resident memory so far in bytes."""
    if "run" in request:
        return {"times": timed(program.call, request["run"], request["most"])}
    np.save(request["output"], program.first(program.call()))
    return {"peak": peak_memory()}


def peak_memory() -> int:
    """Peak of this process's resident memory in bytes.
    Not ``ru_maxrss`` on Linux, which has the parent's as its least.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _function(name: str) -> Callable[[Job], Any]:
    module, _, attribute = name.partition(":")
    found: Callable[[Job], Any] = getattr(importlib.import_module(module), attribute)
    return found


def _give_back_memory() -> None:
    """What preparing took and freed goes back to the system, for the workers beside this one."""
    gc.collect()
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def reason(error: BaseException) -> str:
    """An error in a line; with what caused it first, where that is another."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    told = dict.fromkeys((causes[0], causes[-1]))
    return ", because of ".join(f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}" for e in told)


def _protocol() -> IO[str]:
    """The pipe to the parent; from here on, file descriptor 1 is stderr."""
    sys.stdout.flush()
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return pipe


def main() -> None:
    """Build, or serve."""
    pipe = _protocol()

    def say(message: Mapping[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")

    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    try:
        if sys.argv[2] == "build":
            start = time.perf_counter()
            spent = _function(job.build)(job)
            say({"seconds": time.perf_counter() - start if spent is None else spent})
            return
        program: Loaded = _function(job.load)(job)
        _give_back_memory()
        size = sum(path.stat().st_size for path in program.files)
        say({"seconds": program.seconds, "bytes": size, "version": program.version})
        for line in sys.stdin:
            say(answer(program, json.loads(line)))
    except Exception as error:
        say({"error": reason(error)})
        raise


if __name__ == "__main__":
    main()
