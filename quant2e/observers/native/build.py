"""Build of the C++ kernels: once per machine, with the user's compiler, into a folder that is only the user's.

No header of torch is used, only its stable C interface, so that any C++ compiler does, in about a second.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from quant2e.versions import TORCH_VERSION

_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
_WISHES = (("-march=native",), ())
"""Flags to try in turn: not every compiler has them."""

_BUILD_SECONDS, _SECONDS_WITH_FLAGS = 120, 1800
"""For one source file; with flags of the user's, such as those of sanitizers, compilers take longer."""

_TORCH = Path(torch.__file__).parent / "lib"
_LIBRARIES = (f"-L{_TORCH}", "-ltorch_cpu", "-lm")


def cache_folder() -> Path:
    """Where built kernels are kept: ``$QUANT2E_CACHE_DIR``, or quant2e's folder in the user's cache."""
    chosen = os.environ.get("QUANT2E_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(chosen) if chosen else Path(base) / "quant2e"


def built(source: Path, *included: Path, flags: tuple[str, ...] = ()) -> Path | None:
    """The compiled library of ``source``, made now if it is not there yet; None without a compiler.

    ``included``: the files it includes, which a library is bound to as well. ``flags``: for this library. Switched off
    by ``QUANT2E_NATIVE=0``. Raises OSError, RuntimeError and `subprocess.SubprocessError` when the compiler fails.
    """
    program = None if os.environ.get("QUANT2E_NATIVE") == "0" else compiler()
    if program is None:
        return None
    folder = _private(cache_folder())
    path = folder / f"{source.stem}-{_fingerprint(program, (source, *included), flags)}.so"
    if path.exists():
        return path
    handle, name = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    part = Path(name)
    try:
        _compile(program, source, part, flags)
        part.replace(path)  # processes that build at the same time replace each other's equal file
    finally:
        part.unlink(missing_ok=True)
    return path


def built_together(name: str, sources: Sequence[Path], included: Sequence[Path], flags: tuple[str, ...]) -> Path | None:
    """One library, called ``name``, of several ``sources``, which are compiled side by side; otherwise as `built`.

    ``flags``: all that the compiler is told. What they say of the processor is what the library needs.
    ``$QUANT2E_NATIVE_FLAGS`` adds some, such as those of sanitizers.
    """
    flags = (*flags, *os.environ.get("QUANT2E_NATIVE_FLAGS", "").split())
    program = None if os.environ.get("QUANT2E_NATIVE") == "0" else compiler()
    if program is None:
        return None
    folder = _private(cache_folder())
    path = folder / f"{name}-{_fingerprint(program, (*sources, *included), flags)}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=folder) as work, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(work) / f"{source.stem}.o" for source in sources]
        each = [(*flags, "-c", str(source), "-o", str(to)) for source, to in zip(sources, objects, strict=True)]
        for source, complaint in zip(
            sources, pool.map(lambda command: _complaint(program, command), each), strict=True
        ):
            if complaint:
                raise RuntimeError(f"{program} cannot compile {source.name}: {complaint}")
        part = Path(work) / path.name
        complaint = _complaint(program, (*flags, "-shared", *map(str, objects), "-o", str(part), *_LIBRARIES))
        if complaint:
            raise RuntimeError(f"{program} cannot link {path.name}: {complaint}")
        part.replace(path)
    return path


def _complaint(compiler: str, command: Sequence[str]) -> str:
    """What the compiler says where it fails; empty where it does not."""
    seconds = _SECONDS_WITH_FLAGS if os.environ.get("QUANT2E_NATIVE_FLAGS") else _BUILD_SECONDS
    done = subprocess.run([compiler, *command], capture_output=True, timeout=seconds, check=False)  # noqa: S603 - the user's compiler
    return done.stderr.decode(errors="replace")[-500:] or "no reason given" if done.returncode else ""


def warn_unbuilt(source: Path, error: Exception, instead: str) -> None:
    """Say that there is a compiler, that it failed on ``source``, and what computes ``instead``."""
    warnings.warn(
        f"{source.name} could not be built or loaded: {error}. {instead}. $CXX chooses another compiler, and "
        "QUANT2E_NATIVE=0 does without it",
        RuntimeWarning,
        stacklevel=2,
    )


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, or the first of the usual names that is there; None without one."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


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


def _fingerprint(compiler: str, sources: tuple[Path, ...], flags: tuple[str, ...]) -> str:
    """Of all that the compiled code depends on: sources, flags, torch, compiler, processor."""
    parts = [
        *(source.read_bytes() for source in sources),
        repr((_FLAGS, _WISHES, flags, TORCH_VERSION)).encode(),
    ]
    parts += [compiler.encode(), _processor().encode()]
    parts.append(str(Path(compiler).resolve().stat().st_mtime_ns).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"


def _compile(compiler: str, source: Path, target: Path, flags: tuple[str, ...]) -> None:
    complaint = ""
    for wishes in _WISHES:
        command = [
            *_FLAGS,
            *flags,
            *wishes,
            str(source),
            "-o",
            str(target),
            *_LIBRARIES,
        ]
        complaint = _complaint(compiler, command)
        if not complaint:
            return
    raise RuntimeError(f"{compiler} cannot compile {source.name}: {complaint}")
