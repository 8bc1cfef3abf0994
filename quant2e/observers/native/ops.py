"""Native observer ops of ``native.cpp``: built by the first calibration on a machine that has a C++ compiler.

They are ops of torch's dispatcher, ``torch.ops.quant2e.observe_...``, so that compiled graphs hold them as well.
Without a compiler, on another device than the CPU, or with ``QUANT2E_NATIVE=0`` in the environment, the same numbers
come from plain torch. Nothing is built, loaded or registered by importing this module.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from quant2e.isolation import ALONE
from quant2e.observers.native.build import built, warn_unbuilt

SOURCE = Path(__file__).with_name("native.cpp")
KERNEL = Path(__file__).with_name("native_kernel.cpp")
OP = Path(__file__).with_name("native_op.cpp")
"""What native.cpp shares with the kernels of ``lowering``."""

_SEEN = "Tensor x, float limit, Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) counts"
SCHEMAS = {
    "observe_minmax": f"({_SEEN}) -> ()",
    "observe_average": f"({_SEEN}, float constant) -> ()",
    "observe_histogram": f"({_SEEN}, Tensor(d!) histogram) -> ()",
}
"""``x``: float32 of any shape and strides. ``limit``: smallest magnitude of a mask sentinel. ``min_val``, ``max_val``:
float32 scalars; ``counts``: int64 ``[4]``, see `ranges.TALLY`; ``histogram``: int64 ``[bins]``.
"""


_ready: list[Mapping[str, Any]] = []
"""The loaded ops, for the quickest answer: observers ask for them with every tensor."""


def loaded() -> Mapping[str, Any] | None:
    """The ops by name when they have been loaded already; never builds them."""
    return _ready[0] if _ready else None


def load_ops() -> Mapping[str, Any] | None:
    """The ops by name, built now if this machine has not built them before; None where that is not possible.

    A compiler that fails is a RuntimeWarning. Asked once per process. Takes about a second the first time on a
    machine, and a millisecond after that.
    """
    with ALONE:
        return _load_ops()


@cache
def _load_ops() -> Mapping[str, Any] | None:
    try:
        library = built(SOURCE, KERNEL, OP)
        if library is None:
            return None
        _ready.append(_registered(library))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        warn_unbuilt(SOURCE, error, "Observers compute the same numbers in plain torch, more slowly")
        return None
    return _ready[0]


def _registered(path: Path) -> Mapping[str, Any]:
    library = ctypes.CDLL(str(path))
    for name, schema in SCHEMAS.items():
        # Any layout does: without the tag, a compiled graph would copy what is not laid out as it was when captured.
        torch.library.define(f"quant2e::{name}", schema, tags=(torch.Tag.flexible_layout,))
        torch.library.register_fake(f"quant2e::{name}", _nothing)
    failed = library.quant2e_register()
    if failed:
        raise RuntimeError(f"torch refused the ops of {SOURCE.name}, at step {failed}")
    return {name: getattr(torch.ops.quant2e, name).default for name in SCHEMAS}


def _nothing(*_: Any) -> None:
    """What tracing needs to know of the ops: they return nothing, and their schemas say what they write."""
