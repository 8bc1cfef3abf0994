"""The op of a region, ``torch.ops.quant2e.int8_region``: built for this machine, and given to torch.

It is an op like any other: eager calls it, Inductor calls it from what it generates, and a fake kernel says what comes
out. Its plan and its constants are tensors.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lowering.native.kernels.shipped import COMMON, FLAGS, KERNELS, included, shipped, sources
from quant2e.errors import LoweringError
from quant2e.isolation import ALONE
from quant2e.observers.native.build import built_together, warn_unbuilt

_NEEDED = {
    "avx512_vnni": ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni"),
    "avx2_vnni": ("avx2", "fma3", "avx_vnni"),
    "avx2": ("avx2", "fma3"),
    "plain": (),
}

_NAME = "int8_region"
_SCHEMA = "(Tensor[] inputs, Tensor plan, Tensor constants, int[] outputs) -> Tensor[]"

Region = Callable[[Sequence[Tensor], Tensor, Tensor, Sequence[int]], list[Tensor]]


_CHOICE = "QUANT2E_NATIVE_ISA"
"""Environment variable that chooses an instruction set by hand, such as ``avx2``."""


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets of `FLAGS` that this processor has, the best first."""
    has = torch.cpu.get_capabilities()
    return tuple(name for name, needed in _NEEDED.items() if all(has.get(feature) for feature in needed))


def instruction_set() -> str:
    """The one that regions run on: ``$QUANT2E_NATIVE_ISA``, or the best of `instruction_sets` that the compiler knows.

    Empty without a compiler. Raises `LoweringError` for a choice that this processor does not have.
    """
    with ALONE:
        return _chosen()[0]


def load_region_op(name: str | None = None) -> Region | None:
    """The op, built and registered now; None where there is no C++ compiler.

    ``name``: one of `instruction_sets`, by default that of `instruction_set`, whose op is called ``int8_region``. Those
    of others stand beside it, as ``int8_region_avx2`` and so on.

    ``inputs``: float32, samples first. ``plan``, ``constants``: of a `Plan`, and ``outputs``: for each the number of
    its dimensions and its sizes, the first of which is that of the inputs. Returns float32 tensors, images with their
    channels last in memory. A compiler that fails is a RuntimeWarning.
    """
    with ALONE:
        chosen, library = _chosen()
        if name is not None and name != chosen:
            library, _ = _tried(name)
        return None if library is None else _registered(library, _NAME if name in (None, chosen) else f"{_NAME}_{name}")


@cache
def _chosen() -> tuple[str, Path | None]:
    """The instruction set of regions and its library; nothing where there is none."""
    wish, names = os.environ.get(_CHOICE), instruction_sets()
    if wish and wish not in names:
        raise LoweringError(f"{_CHOICE}={wish}: kernels for this processor are {', '.join(names)}. Choose one of them")
    complaints = {}
    for name in (wish,) if wish else names:
        library, complaint = _tried(name)
        if complaint is not None:
            complaints[name] = complaint
            continue
        if complaints:
            _warn(next(iter(complaints.values())), f"Int8 regions run on {name} kernels")
        return (name, library) if library is not None else ("", None)
    _warn(next(iter(complaints.values())), "Int8 regions run op by op")
    return "", None


def _tried(name: str) -> tuple[Path | None, Exception | None]:
    """The library for an instruction set, or why there is none; neither without a compiler."""
    try:
        library = built_library(name)
        if library is not None:
            ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return None, error
    return library, None


def _warn(error: Exception, instead: str) -> None:
    warn_unbuilt(KERNELS / "region.cpp", error, instead)


@cache
def _registered(library: Path, name: str) -> Region:
    torch.library.define(f"quant2e::{name}", _SCHEMA)
    torch.library.register_fake(f"quant2e::{name}", _shapes)
    if failed := ctypes.CDLL(str(library)).quant2e_register(name.encode()):
        raise RuntimeError(f"torch refused the op quant2e::{name}, at step {failed}")
    op: Region = getattr(torch.ops.quant2e, name).default
    return op


def built_library(name: str) -> Path | None:
    """The library for an instruction set: one that was installed with the sources, or made now if it is not there yet.

    None without both, or without a compiler where an installed one does not load.
    """
    wanted = os.environ.get("QUANT2E_NATIVE") != "0" and not os.environ.get("QUANT2E_NATIVE_FLAGS")
    if wanted and (path := shipped(name)) is not None:
        try:
            ctypes.CDLL(str(path))
        except OSError as error:  # it was made with a newer C library, say
            warn_unbuilt(path, error, "It is compiled here, where there is a compiler")
        else:
            return path
    return built_together(f"native-{name}", sources(), included(), (*COMMON, *FLAGS[name]))


def _shapes(inputs: Sequence[Tensor], _plan: Tensor, _constants: Tensor, outputs: Sequence[int]) -> list[Tensor]:
    made: list[Tensor] = []
    at = 0
    while at < len(outputs):
        rank = outputs[at]
        sizes = (inputs[0].shape[0], *outputs[at + 2 : at + 1 + rank])
        layout = torch.channels_last if rank == 4 else torch.contiguous_format
        dtype = torch.float32 if outputs[at + 1] else torch.uint8
        made.append(inputs[0].new_empty(sizes, dtype=dtype).contiguous(memory_format=layout))
        at += 1 + rank
    return made
