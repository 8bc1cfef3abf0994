"""Inputs of a benchmark: where the user gives none, one call that all programs take, so that their times compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowering.files.program_file import opened, read_arrays, read_program
from lowering.signature import TensorInput


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnInputs:
    """Inputs that a program file holds, or noise of its sizes, in a ``file``; and the tensors that it ``takes``."""

    file: Path
    program: Path
    takes: tuple[TensorInput, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]

    def fit(self, other: OwnInputs) -> bool:
        """Whether another program takes these."""
        pairs = zip(other.takes, self.dtypes, self.shapes, strict=False)
        return len(other.takes) == len(self.shapes) and all(_fits(*pair) for pair in pairs)

    def rank(self) -> tuple[bool, int]:
        """Those that come first are taken first: what a model was exported with, and of noise the least."""
        return self.program.suffix != ".pt2", sum(map(_count, self.shapes))


def own_inputs(program: Path, method: str | None, file: Path) -> OwnInputs:
    """Write the inputs of a program to a file."""
    loaded = opened(read_program(program, native=True), method)
    tensors = loaded.tensors()
    torch.save(list(tensors), file)
    return OwnInputs(
        file=file,
        program=program,
        takes=loaded.inputs,
        dtypes=tuple(tensor.dtype for tensor in tensors),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors),
    )


def chosen(own: Sequence[OwnInputs]) -> list[Path]:
    """For each program the file of its inputs: of those that all take, where there are any, and else its own."""
    for one in sorted(own, key=OwnInputs.rank):
        if all(one.fit(other) for other in own):
            return [one.file] * len(own)
    return [one.file for one in own]


def read_bench_inputs(file: Path) -> tuple[Tensor, ...]:
    """The tensors of a file that `own_inputs` wrote, or the arrays of an ``.npz``."""
    if file.suffix == ".npz":
        return read_arrays(file)
    return tuple(torch.load(file, weights_only=True))


def described(tensors: Sequence[Tensor]) -> str:
    """Dtypes and sizes, as people read them."""
    return ", ".join(f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}" for one in tensors)


def _fits(one: TensorInput, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    sizes = zip(one.sizes, shape, strict=False)
    return one.dtype is dtype and len(one.sizes) == len(shape) and all(low <= x <= high for (low, high), x in sizes)


def _count(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
