"""The peak rate of int8 products on one core of this machine, measured: what no program can exceed."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from lowering.native.kernels.op import instruction_set
from lowering.native.kernels.shipped import COMMON, FLAGS, KERNELS
from quant2e.observers.native.build import built_together

SOURCE = Path(__file__).with_name("peak.cpp")
SECONDS = 0.3


@cache
def _library() -> ctypes.CDLL:
    name = instruction_set()
    path = built_together(f"peak-{name}", [SOURCE], sorted(KERNELS.glob("*.h")), (*COMMON, *FLAGS[name]))
    if path is None:
        raise RuntimeError("the peak rate is measured in C++, and there is no compiler")
    library = ctypes.CDLL(str(path))
    for rate in (library.quant2e_peak_int8, library.quant2e_spilled_int8):
        rate.argtypes, rate.restype = [ctypes.c_double], ctypes.c_double
    return library


def peak_int8(seconds: float = SECONDS) -> float:
    """Multiply-accumulates of bytes in a second on one core, in registers: the best of about ``seconds``."""
    rate: float = _library().quant2e_peak_int8(seconds)
    return rate


def spilled_int8(seconds: float = SECONDS) -> float:
    """As `peak_int8`, of an inner loop whose sums are in memory: where a compiler finds no registers for them."""
    rate: float = _library().quant2e_spilled_int8(seconds)
    return rate
