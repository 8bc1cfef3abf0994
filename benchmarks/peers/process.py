"""The parent's side of a worker: start it with a fixed number of threads, ask, and know why it failed."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from benchmarks.peers.worker import Job
from quant2e.files import write_text

ROOT = Path(__file__).parents[2]
LEAST_MEMORY = 3e9
"""Bytes that must be available before another worker is started: running out would end other processes too."""


class WorkerError(Exception):
    """A worker could not do what it was asked to; the message is the reason for the table."""


def available_memory() -> float:
    """Bytes that processes can still take; infinite where the system does not say."""
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return float("inf")


def environment(threads: int) -> dict[str, str]:
    """Variables by which every library takes its number of threads."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_COMPILE_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **counts, **quiet}


class Worker:
    """A process for one job. Use it as a context, which ends the process."""

    def __init__(self, python: Sequence[str], job: Job, stage: str, log: Path) -> None:
        if (left := available_memory()) < LEAST_MEMORY:
            raise WorkerError(f"not started: only {left / 1e9:.1f} GB of memory are available")
        described = job.file(f"_{job.threads}.job.json")
        write_text(described, json.dumps(asdict(job)))
        self._log = log
        with log.open("a") as output:
            self._process = subprocess.Popen(
                [*python, "-m", "benchmarks.peers.worker", str(described), stage],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=ROOT,
                env=environment(job.threads),
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self, seconds: float) -> dict[str, Any]:
        """The next message. Raises `WorkerError` when there is none in time, or it tells of an error."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            self._process.kill()
            raise WorkerError(f"no answer within {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise WorkerError(f"ended with exit code {code}: {_last_line(self._log)}")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise WorkerError(message["error"])
        return message

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"ended: {_last_line(self._log)}") from None
        return self.wait(seconds)

    def stop(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def build(python: Sequence[str], job: Job, log: Path, seconds: float) -> float:
    """Let a worker build the files of an engine; seconds that took, also when they were built before."""
    done = job.file(".built.json")
    if not done.exists():
        with Worker(python, job, "build", log) as worker:
            spent = worker.wait(seconds)["seconds"]
        write_text(done, json.dumps({"seconds": spent}))
    found: float = json.loads(done.read_text())["seconds"]
    return found
