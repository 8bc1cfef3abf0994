"""The one-pass ops of ``native.cpp``: built once per machine, by the first calibration, when there is a C++ compiler.

They are ops of torch's dispatcher, ``torch.ops.quant2e.observe_...``, so that compiled graphs hold them as well. Without
a compiler, on another device than the CPU, or with ``QUANT2E_NATIVE=0`` in the environment, the same numbers come from
plain torch. Nothing is built, loaded or registered by importing this module.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("native.cpp")
KERNEL = Path(__file__).with_name("native_kernel.cpp")

_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
_WISHES = (("-march=native",), ())
"""Flags to try in turn: not every compiler has them."""

_BUILD_SECONDS = 120

_TORCH = Path(torch.__file__).parent / "lib"

_SEEN = "Tensor x, float limit, Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) counts"
SCHEMAS = {
    "observe_minmax": f"({_SEEN}) -> ()",
    "observe_average": f"({_SEEN}, float constant) -> ()",
    "observe_histogram": f"({_SEEN}, Tensor(d!) histogram, Tensor(e!) peaks) -> ()",
}
"""``x``: float32 of any shape and strides. ``limit``: smallest magnitude of a mask sentinel. ``min_val``, ``max_val``:
float32 scalars; ``counts``: int64 ``[4]``, see `ranges.TALLY`; ``histogram``: int64 ``[bins]``; ``peaks``: int64 ``[2, 256]``.
"""


def cache_folder() -> Path:
    """Where built kernels are kept: ``$QUANT2E_CACHE_DIR``, or quant2e's folder in the user's cache."""
    chosen = os.environ.get("QUANT2E_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(chosen) if chosen else Path(base) / "quant2e"


_ready: list[Mapping[str, Any]] = []
"""The loaded ops, for the quickest answer: observers ask for them with every tensor."""


def loaded() -> Mapping[str, Any] | None:
    """The ops by name when they have been loaded already; never builds them."""
    return _ready[0] if _ready else None


@cache
def load() -> Mapping[str, Any] | None:
    """The ops by name, built now if this machine has not built them before; None where that is not possible.

    Asked once per process. Takes about a second the first time on a machine, and a millisecond after that.
    """
    if os.environ.get("QUANT2E_NATIVE") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        _ready.append(_registered(_built(compiler)))
    except (OSError, subprocess.SubprocessError, RuntimeError):
        return None
    return _ready[0]


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


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


def _built(compiler: str) -> Path:
    """Path of the compiled library, which is made when it is not there yet."""
    folder = _private(cache_folder())
    path = folder / f"native-{_fingerprint(compiler)}.so"
    if path.exists():
        return path
    handle, name = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    part = Path(name)
    try:
        _compile(compiler, part)
        part.replace(path)  # processes that build at the same time replace each other's equal file
    finally:
        part.unlink(missing_ok=True)
    return path


def _private(folder: Path) -> Path:
    """``folder``, made when missing; a fresh one when others could put a library there."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        mine = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        if mine and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="quant2e-"))


def _fingerprint(compiler: str) -> str:
    """Of all that the compiled code depends on: sources, flags, torch, compiler, processor."""
    parts = [SOURCE.read_bytes(), KERNEL.read_bytes(), repr((_FLAGS, _WISHES, torch.__version__)).encode()]
    parts += [compiler.encode(), _processor().encode()]
    parts.append(str(Path(compiler).resolve().stat().st_mtime_ns).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"


def _compile(compiler: str, target: Path) -> None:
    complaint = ""
    for wishes in _WISHES:
        command = [compiler, *_FLAGS, *wishes, str(SOURCE), "-o", str(target), f"-L{_TORCH}", "-ltorch_cpu", "-lm"]
        done = subprocess.run(command, capture_output=True, timeout=_BUILD_SECONDS, check=False)  # noqa: S603 - the user's compiler
        if done.returncode == 0:
            return
        complaint = done.stderr.decode(errors="replace")[-500:]
    raise RuntimeError(f"{compiler} cannot compile {SOURCE.name}: {complaint}")
