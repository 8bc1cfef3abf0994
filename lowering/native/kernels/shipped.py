"""Libraries of int8 regions that a wheel for Linux on x86-64 brings, compiled when it is made.

They are found by a hash of their sources. Only the standard library is imported: ``setup.py`` runs this file where
torch need not be installed. The libraries call torch's stable C interface, whose symbols are those of the torch that is
loaded.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = Path(__file__).parent
FOLDER = KERNELS / "shipped"
"""Where a wheel has them; a checkout has none."""

COMMON = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-w")
"""Hidden: libraries for several instruction sets may be loaded side by side."""

FLAGS = {
    "avx512_vnni": (
        "-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni",
    ),
    "avx2_vnni": ("-mavx2", "-mfma", "-mavxvnni"),
    "avx2": ("-mavx2", "-mfma"),
    "plain": ("-O2",),
}  # fmt: skip
"""By instruction set, the best first: what the compiler is told. Plain C++ gains nothing from -O3 but time to build."""

_STATIC = ("-static-libstdc++", "-static-libgcc")
"""A machine without a compiler may have older ones, or none."""


def sources() -> list[Path]:
    """The files that are compiled, and beside them what they include."""
    return sorted(KERNELS.glob("*.cpp"))


def included() -> list[Path]:
    """What the sources include."""
    return [*sorted(KERNELS.glob("*.h")), KERNELS.parents[2] / "quant2e" / "observers" / "native" / "native_op.cpp"]


def shipped(name: str) -> Path | None:
    """The library for an instruction set that came with these sources; None where none did."""
    path = FOLDER / _file_name(name)
    return path if path.exists() else None


def ship(names: Iterable[str], compiler: str, into: Path) -> list[Path]:
    """Compile into a folder, side by side. Raises RuntimeError with what the compiler says where it fails."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into) as folder, ThreadPoolExecutor() as pool:
        work = Path(folder)
        torch = _stand_in(work, compiler)
        jobs = [(name, source, work / f"{name}-{source.stem}.o") for name in names for source in sources()]
        list(pool.map(lambda job: _run(compiler, *COMMON, *FLAGS[job[0]], "-c", job[1], "-o", job[2]), jobs))
        made = []
        for name in dict.fromkeys(name for name, _, _ in jobs):
            objects = [to for of, _, to in jobs if of == name]
            part = work / _file_name(name)
            _run(compiler, "-shared", *objects, "-o", part, "-Wl,--no-as-needed", torch, *_STATIC, "-lm")
            path = into / part.name
            part.replace(path)
            made.append(path)
    return made


def able() -> bool:
    """Whether this is a machine for which libraries are shipped."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def _file_name(name: str) -> str:
    parts = [*(path.read_bytes() for path in (*sources(), *included())), repr((COMMON, FLAGS[name])).encode()]
    return f"native-{name}-{hashlib.sha256(bytes(0).join(parts)).hexdigest()[:16]}.so"


def _stand_in(work: Path, compiler: str) -> Path:
    """An empty library that is called as torch's is: the loader then takes torch's, which is in the process."""
    path = work / "libtorch_cpu.so"
    _run(compiler, "-shared", "-x", "c++", "/dev/null", "-o", path, f"-Wl,-soname,{path.name}")
    return path


def _run(compiler: str, *arguments: str | Path) -> None:
    done = subprocess.run([compiler, *map(str, arguments)], capture_output=True, check=False)  # noqa: S603 - the user's compiler
    if done.returncode:
        raise RuntimeError(
            f"{compiler} {' '.join(map(str, arguments))}: {done.stderr.decode(errors='replace')[-2000:]}"
        )
