"""Kernels read no byte beyond what they are given: memory between two pages that nobody may touch."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowering.native.kernels.op import instruction_sets, load_region_op  # noqa: F401  # read by the process of a test
from quant2e.observers.native.build import compiler
from tests.lowering.native.layers import planned
from tests.lowering.native.test_sums import generated

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mprotect is not there")

PAGE = mmap.PAGESIZE
NOTHING = 0  # PROT_NONE


class Guarded:
    """Copies of tensors, each between two pages that may not be touched; they end where the second begins, up to
    ``behind`` bytes.
    """

    def __init__(self) -> None:
        self._kept: list[mmap.mmap] = []

    def __call__(self, x: Tensor, behind: int = 0) -> Tensor:
        raw = x.contiguous().flatten()
        size = raw.numel() * raw.element_size()
        pages = -(-(size + behind) // PAGE)
        memory = mmap.mmap(-1, (pages + 2) * PAGE)
        self._kept.append(memory)
        start = (pages + 1) * PAGE - size - behind
        made = torch.frombuffer(memory, dtype=raw.dtype, count=raw.numel(), offset=start)
        made.copy_(raw)
        address = made.data_ptr() - start
        for page in (address, address + (pages + 1) * PAGE):
            if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, NOTHING):
                raise OSError("mprotect failed")
        return made.reshape(x.shape)


def run_guarded(name: str, seeds: range) -> None:
    """Layers whose inputs and constants are guarded, with images as torch lays them out and with channels last."""
    op = load_region_op(name)
    assert op is not None, "the test asks for a compiler"
    for seed in seeds:
        layer, x, rows = generated(seed)
        plan, _ = planned(layer, rows=rows)
        floats = x.float() - layer.zero
        exact = layer.sums(x).float()
        guarded = Guarded()
        constants = guarded(plan.constants)
        inputs = [guarded(floats[:, :, 0, 0])] if rows else [
            guarded(floats),
            guarded(floats.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        ]  # fmt: skip
        for given in inputs:
            (made,) = op([given], plan.numbers, constants, plan.outputs)
            assert torch.equal(made[:, :, None, None] if rows else made, exact), f"{name}, seed {seed}"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """What a process of its own does, which a signal may end."""
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", f"from {__name__} import *\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=600)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler, so there are no kernels")
@pytest.mark.slow
def test_nothing_is_read_beyond_inputs_and_constants() -> None:
    done = run_python("for name in instruction_sets(): run_guarded(name, range(20))")
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.slow
def test_a_byte_beyond_would_be_noticed() -> None:
    done = run_python("x = Guarded()(torch.zeros(3)); ctypes.string_at(x.data_ptr(), 13)")
    ended = done.returncode < 0 or "AddressSanitizer" in done.stderr  # which catches the signal, and says where
    assert ended, "reading a guarded byte ends a process by a signal"
