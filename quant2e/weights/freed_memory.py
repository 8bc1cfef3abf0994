"""Freed memory: handed back to the system, where the C library keeps it between tensors that stay."""

from __future__ import annotations

import ctypes
import sys


def hand_back_memory() -> None:
    """Let the C library return what is free; nothing happens where it has no such call, as it is glibc's."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
