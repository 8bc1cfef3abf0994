"""The op of a region, ``torch.ops.quant2e.int8_region``: built for this machine, and given to torch.

It is an op like any other: eager calls it, Inductor calls it from what it generates, and a fake kernel says what comes
out. Its plan and its constants are tensors.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from quant2e.isolation import ALONE
from quant2e.observers.native.build import built_together, warn_unbuilt
from quant2e.observers.native.ops import OP

FOLDER = Path(__file__).with_name("kernels")

FLAGS = {
    "avx512_vnni": (
        "-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni",
    ),
    "avx2_vnni": ("-mavx2", "-mfma", "-mavxvnni"),
    "avx2": ("-mavx2", "-mfma"),
    "plain": (),
}  # fmt: skip
"""By instruction set, the best first: what the compiler is told."""

_NEEDED = {
    "avx512_vnni": ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni"),
    "avx2_vnni": ("avx2", "fma3", "avx_vnni"),
    "avx2": ("avx2", "fma3"),
    "plain": (),
}

_NAME = "quant2e::int8_region"
_SCHEMA = "(Tensor[] inputs, Tensor plan, Tensor constants, int[] outputs) -> Tensor[]"

Region = Callable[[Sequence[Tensor], Tensor, Tensor, Sequence[int]], list[Tensor]]


def instruction_set() -> str:
    """The best of `FLAGS` that this processor has."""
    able = torch.cpu.get_capabilities()
    return next(name for name, needed in _NEEDED.items() if all(able.get(feature) for feature in needed))


def load_op(name: str | None = None) -> Region | None:
    """The op, built and registered now; None where there is no C++ compiler. ``name``: of an instruction set, that of
    this processor by default.

    ``inputs``: float32, samples first. ``plan``, ``constants``: of a `Plan`, and ``outputs``: for each the number of
    its dimensions and its sizes, the first of which is that of the inputs. Returns float32 tensors, images with their
    channels last in memory. A compiler that fails is a RuntimeWarning.
    """
    with ALONE:
        return _load_op(name or instruction_set())


@cache
def _load_op(name: str) -> Region | None:
    try:
        library = built(name)
        if library is None:
            return None
        handle = ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        warn_unbuilt(FOLDER / "region.cpp", error, "Int8 regions run op by op")
        return None
    torch.library.define(_NAME, _SCHEMA)
    torch.library.register_fake(_NAME, _shapes)
    if failed := handle.quant2e_register():
        raise RuntimeError(f"torch refused the op {_NAME}, at step {failed}")
    op: Region = torch.ops.quant2e.int8_region.default
    return op


def built(name: str) -> Path | None:
    """The library for an instruction set, made now if it is not there yet; None without a compiler."""
    sources = sorted(FOLDER.glob("*.cpp"))
    headers = [*sorted(FOLDER.glob("*.h")), OP]
    return built_together(f"native-{name}", sources, headers, FLAGS[name])


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
