"""The one-pass kernel of ``native.cpp``: built once per machine, by the first calibration, when there is a C++ compiler.

Without a compiler, on another device than the CPU, or with ``QUANT2E_NATIVE=0`` in the environment, the same numbers
come from plain torch. Nothing is built or loaded by importing this module.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("native.cpp")

_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
_WISHES = (("-march=native", "-fopenmp"), ("-fopenmp",), ())
"""Flags to try in turn: not every compiler has OpenMP."""

_BUILD_SECONDS = 120

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_COMMON = (_POINTER, _LONG, ctypes.c_float, ctypes.c_int, _POINTER, _POINTER, _POINTER)
_ARGUMENTS = {
    "quant2e_minmax": _COMMON,
    "quant2e_average": (*_COMMON, ctypes.c_float),
    "quant2e_histogram": (*_COMMON, _POINTER, _POINTER, ctypes.c_int),
}


def cache_folder() -> Path:
    """Where built kernels are kept: ``$QUANT2E_CACHE_DIR``, or quant2e's folder in the user's cache."""
    chosen = os.environ.get("QUANT2E_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(chosen) if chosen else Path(base) / "quant2e"


_ready: list[ctypes.CDLL] = []
"""The loaded kernel, for the quickest answer: observers ask for it with every tensor."""


def loaded() -> ctypes.CDLL | None:
    """The kernel when it has been loaded already; never builds it."""
    return _ready[0] if _ready else None


@cache
def load() -> ctypes.CDLL | None:
    """The kernel, built now if this machine has not built it before; None where that is not possible.

    Asked once per process. Takes about a second the first time on a machine, and a millisecond after that.
    """
    if os.environ.get("QUANT2E_NATIVE") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        _ready.append(_declared(_built(compiler)))
    except (OSError, subprocess.SubprocessError, RuntimeError):
        return None
    return _ready[0]


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _declared(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return library


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
    """Of all that the compiled code depends on: source, flags, compiler, processor."""
    parts = [SOURCE.read_bytes(), repr((_FLAGS, _WISHES)).encode(), compiler.encode(), _processor().encode()]
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
        command = [compiler, *_FLAGS, *wishes, str(SOURCE), "-o", str(target), "-lm"]
        done = subprocess.run(command, capture_output=True, timeout=_BUILD_SECONDS, check=False)  # noqa: S603 - the user's compiler
        if done.returncode == 0:
            return
        complaint = done.stderr.decode(errors="replace")[-500:]
    raise RuntimeError(f"{compiler} cannot compile {SOURCE.name}: {complaint}")
