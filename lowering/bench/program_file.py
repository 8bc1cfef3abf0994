"""Program files as callables: ``.pte`` in the ExecuTorch runtime, ``.pt2`` in eager torch.

Opening and running a file executes no code of the file. A ``.pte`` is data that the runtime interprets, verified as it
is loaded; a ``.pt2`` is checked part by part (`quant2e.storage.archive_check`), and refused where it holds pickles or
libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowering.signature import TensorInput
from quant2e.documents.arrays import read_archive, read_array
from quant2e.errors import FileFormatError, LoweringError
from quant2e.quantized_model import QuantizedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenProgram:
    """A loaded program. ``call`` takes its tensors as a flat list; ``inputs`` says which, ``example`` holds some."""

    path: Path
    inputs: tuple[TensorInput, ...]
    call: Callable[[Sequence[Tensor]], Any]
    example: tuple[Tensor, ...] | None = None

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Run once. Raises `LoweringError` for other tensors than the program takes."""
        if len(tensors) != len(self.inputs):
            raise LoweringError(
                f"{self.path.name} takes {len(self.inputs)} tensor(s), not {len(tensors)}: {self._takes()}"
            )
        for expected, tensor in zip(self.inputs, tensors, strict=True):
            if not expected.takes(tensor):
                got = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
                raise LoweringError(f"{self.path.name} takes {expected}, not {got}")
        try:
            return self.call(tensors)
        except RuntimeError as error:
            shapes = [list(tensor.shape) for tensor in tensors]
            raise LoweringError(f"{self.path.name} does not run on tensors of shapes {shapes}: {error}") from error

    def _takes(self) -> str:
        return ", ".join(map(str, self.inputs))

    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs to run with: those the file holds, or noise of the largest sizes; integers are 0 or 1."""
        return self.example if self.example is not None else tuple(_noise(one) for one in self.inputs)


def _noise(one: TensorInput) -> Tensor:
    shape = [high for _, high in one.sizes]
    generator = torch.Generator().manual_seed(0)
    if one.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(one.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(one.dtype)


def read_arrays(path: Path) -> tuple[Tensor, ...]:
    """The arrays of an ``.npz`` file in their order. Raises `FileFormatError`; pickled objects are refused."""
    members = read_archive(path, ".npz file of plain arrays (numpy.savez)")
    return tuple(torch.from_numpy(read_array(raw, f"{name} in {path}")) for name, raw in members.items())


def open_program(path: Path, method: str | None = None) -> OpenProgram:
    """Load a program file. ``method``: which one of a ``.pte``; "forward" unless given.

    Raises `FileFormatError` for a file of another kind, `LoweringError` when the runtime cannot load it, OSError when
    it cannot be read.
    """
    if path.suffix not in (".pte", ".pt2"):
        raise FileFormatError(f"{path}: program files end in .pte (ExecuTorch) or .pt2 (torch.export)")
    path.stat()
    return _open_pte(path, method or "forward") if path.suffix == ".pte" else _open_pt2(path)


def _open_pte(path: Path, method: str) -> OpenProgram:
    from lowering.executorch.runtime import input_tensors, load_method, load_program

    program = load_program(path)
    if method not in program.method_names:
        names = ", ".join(sorted(program.method_names))
        raise LoweringError(f"{path} has no method '{method}'; its methods are {names}: choose one with --method")
    inputs = input_tensors(program, method)
    loaded = load_method(program, method)

    def call(tensors: Sequence[Tensor], _owner: object = program) -> Any:
        # the program, which owns what its methods run on, lives as long as this function
        return loaded.execute(list(tensors))

    return OpenProgram(path=path, inputs=inputs, call=call)


def _open_pt2(path: Path) -> OpenProgram:
    from quant2e.quantized_model import load

    model: QuantizedModel = load(path)
    leaves, spec = pytree.tree_flatten((model.example_inputs, model.example_kwargs))
    if not leaves:
        raise FileFormatError(
            f"{path} holds no example inputs, so nothing says what it takes: save it with quant2e.save"
        )
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    dynamic = model.dynamic_shapes is not None

    def call(tensors: Sequence[Tensor]) -> Any:
        values = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        args, kwargs = pytree.tree_unflatten(values, spec)
        with torch.no_grad():
            return model(*args, **kwargs)

    example = tuple(leaves[place] for place in places)
    inputs = tuple(_like(f"input {index}", tensor, dynamic=dynamic) for index, tensor in enumerate(example))
    return OpenProgram(path=path, inputs=inputs, call=call, example=example)


def _like(name: str, tensor: Tensor, *, dynamic: bool) -> TensorInput:
    # which sizes vary is the graph's own knowledge: it checks them on each call
    sizes = tuple((0, 1 << 62) if dynamic else (size, size) for size in tensor.shape)
    return TensorInput(name=name, dtype=tensor.dtype, sizes=sizes)
