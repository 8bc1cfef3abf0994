"""Latency on a machine that does other things as well: interleaved rounds, medians, ratios."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where numbers were measured. ``isa``: what torch dispatches to;
    ``vnni``: whether the CPU multiplies int8 natively.
    """

    cpu: str
    cores: int
    threads: int
    isa: str
    vnni: bool
    system: str
    versions: Mapping[str, str]

    @property
    def instructions(self) -> str:
        """The instruction set, in a few words."""
        return f"{self.isa}, {'VNNI' if self.vnni else 'no VNNI'}"

    def __str__(self) -> str:
        vnni = "VNNI" if self.vnni else "no VNNI"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.cpu}, {self.cores} core(s), {self.threads} thread(s), {self.isa} ({vnni}); "
            f"{self.system}; {versions}"
        )


def machine() -> Machine:
    """Describe the machine this runs on, with the thread count that torch uses now."""
    from importlib.metadata import version

    flags = _cpuinfo("flags").split()
    return Machine(
        cpu=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        isa=torch.backends.cpu.get_cpu_capability(),
        vnni=bool({"avx512_vnni", "avx_vnni"} & set(flags)),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        versions={
            "torch": str(torch.__version__),  # names the build as well, which the package's metadata may not
            **{name: version(name) for name in ("executorch", "transformers", "scikit-learn")},
        },
    )


def _processor() -> str:
    """The processor's name, with its family and model: virtual machines give all generations of one maker one name."""
    name, numbers = _cpuinfo("model name"), [_cpuinfo(field) for field in ("cpu family", "model")]
    if name and all(numbers):
        return f"{name} (family {numbers[0]}, model {numbers[1]})"
    return name or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Median time of one call in milliseconds, float and int8, and their ratio (above 1: int8 is faster).

    ``speedup`` is the median over rounds of float time / int8 time, each round's two calls being neighbours in time,
    so that it holds also when the machine's speed drifts.
    """

    runtime: str
    what: str
    float_ms: float
    int8_ms: float
    speedup: float
    rounds: int


def compare(
    float_call: Callable[[], object],
    int8_call: Callable[[], object],
    *,
    runtime: str,
    what: str,
    seconds: float = 1.5,
    min_rounds: int = 9,
    max_rounds: int = 201,
) -> Latency:
    """Time two calls in turn for about ``seconds``, after three unmeasured rounds; the order alternates."""
    for _ in range(3):
        float_call()
        int8_call()
    times: tuple[list[float], list[float]] = ([], [])
    calls = (float_call, int8_call)
    end = time.perf_counter() + seconds
    while len(times[0]) < min_rounds or (time.perf_counter() < end and len(times[0]) < max_rounds):
        for which in (0, 1) if len(times[0]) % 2 == 0 else (1, 0):
            start = time.perf_counter()
            calls[which]()
            times[which].append((time.perf_counter() - start) * 1e3)
    return Latency(
        runtime=runtime,
        what=what,
        float_ms=statistics.median(times[0]),
        int8_ms=statistics.median(times[1]),
        speedup=statistics.median(f / i for f, i in zip(*times, strict=True)),
        rounds=len(times[0]),
    )
