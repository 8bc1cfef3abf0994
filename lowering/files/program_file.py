"""Programs as callables: ``.pte`` in ExecuTorch, ``.onnx`` in onnxruntime, ``.xml`` in OpenVINO, ``.pt2`` in torch.

Opening and running a file executes no code of the file: all but a ``.pt2`` are data that a runtime interprets, and
a ``.pt2`` is read by `quant2e.load`. A package of AOTInductor, which also ends in ``.pt2``, is native code: only
`open_native` opens it. The runtimes are written in C++ and trust the data that they are given, so a file that does not
carry a checksum of ours is run in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowering.executorch.pte import check_structure
from lowering.files.child import ChildProgram
from lowering.openvino.files import read_pair
from lowering.signature import TensorInput, laid_out, unusual
from quant2e.checksum import check_content, check_file
from quant2e.documents.arrays import read_archive, read_array
from quant2e.errors import FileFormatError, LoweringError
from quant2e.quantized_model import QuantizedModel
from quant2e.storage.inductor_package import PackageRecord, is_package, read_package_record
from quant2e.storage.pt2 import NOT_HASHED

_SUFFIXES = (".pte", ".onnx", ".xml", ".pt2")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenProgram:
    """A loaded program. ``call`` takes a flat list of tensors and returns one; ``inputs`` says which it takes, and
    ``example`` holds some.

    ``unchanged``: the file carries a checksum, and matches it; False where it has none, and nothing tells.
    ``isolated``: it runs in a process of its own, which ends with this object.
    """

    path: Path
    inputs: tuple[TensorInput, ...]
    call: Callable[[Sequence[Tensor]], Sequence[Any]]
    example: tuple[Tensor, ...] | None = None
    unchanged: bool = False
    isolated: bool = False

    def run(self, tensors: Sequence[Tensor]) -> Sequence[Any]:
        """Run once; flat outputs.

        Raises `LoweringError` for other tensors than the program takes, and `FileFormatError` when a program in a
        process of its own ends it.
        """
        if len(tensors) != len(self.inputs):
            raise LoweringError(
                f"{self.path.name} takes {len(self.inputs)} tensor(s), not {len(tensors)}: {self._takes()}"
            )
        for expected, tensor in zip(self.inputs, tensors, strict=True):
            if not expected.takes(tensor):
                raise LoweringError(f"{self.path.name} takes {expected}, not {_described(tensor)}")
        try:
            return self.call(tensors)
        except (FileFormatError, LoweringError):
            raise
        except Exception as error:
            given = ", ".join(map(_described, tensors))
            raise LoweringError(f"{self.path.name} does not run on {given}: {error}") from error

    def _takes(self) -> str:
        return ", ".join(map(str, self.inputs))

    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs to run with: those the file holds, or noise of the largest sizes; integers are 0 or 1.

        Raises `LoweringError` where they do not fit into memory.
        """
        if self.example is not None:
            return self.example
        try:
            return tuple(_noise(one) for one in self.inputs)
        except (RuntimeError, MemoryError) as error:
            raise LoweringError(f"no memory for what {self.path.name} takes, {self._takes()}: {error}") from error


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return unusual(value) or f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramBytes:
    """What a ``.pte``, ``.onnx`` or ``.xml`` holds, read once. ``unchanged``: it carries a checksum of ours, and
    matches it.

    ``weights``: of the ``.bin`` beside an ``.xml``. ``package``: what a package of AOTInductor says of itself; None for
    other files.
    """

    path: Path
    content: bytes
    unchanged: bool
    weights: bytes = b""
    package: PackageRecord | None = None


def read_program(path: Path, *, native: bool = False) -> ProgramBytes:
    """Read a program file and check its checksum, if it has one. ``native``: packages of AOTInductor are taken, too.

    Raises `FileFormatError` for a file of another kind, or that was changed since it was written; OSError when it
    cannot be read.
    """
    if path.suffix not in _SUFFIXES:
        raise FileFormatError(
            f"{path}: program files end in .pte (ExecuTorch), .onnx, .xml (OpenVINO) or .pt2 (torch.export)"
        )
    if path.suffix == ".pt2":  # `quant2e.load` reads and checks it
        if check_file(path) or is_package(path):
            return _read_package(path, native=native)
        return ProgramBytes(path=path, content=b"", unchanged=False)
    if path.suffix == ".xml":
        xml, weights, unchanged = read_pair(path)
        return ProgramBytes(path=path, content=xml, weights=weights, unchanged=unchanged)
    content = path.read_bytes()
    unchanged = check_content(content, str(path))
    if path.suffix == ".pte":
        check_structure(content, str(path))
    return ProgramBytes(path=path, content=content, unchanged=unchanged)


def _read_package(path: Path, *, native: bool) -> ProgramBytes:
    unchanged = check_file(path)
    if not native:
        raise FileFormatError(
            f"{path} is a package of AOTInductor, which is native code and not run from here: "
            f"torch._inductor.aoti_load_package runs it, as you run a program, and quant2e bench does"
        )
    record = read_package_record(path)
    if record is None:
        raise FileFormatError(
            f"{path} is a package of AOTInductor that does not say what it takes: make it with quant2e"
        )
    return ProgramBytes(path=path, content=b"", unchanged=unchanged, package=record)


def open_native(path: str | os.PathLike[str], method: str | None = None) -> OpenProgram:
    """Open a program file as `open_program` does, and a package of AOTInductor as well, whose native code is loaded.

    Only for packages that you trust as you trust a program. Raises as `open_program` does, and `FileFormatError` for a
    package that does not say what it takes.
    """
    if Path(path).suffix == ".pt2" and is_package(Path(path)):
        return opened(read_program(Path(path), native=True))
    return open_program(path, method)


def open_program(
    path: str | os.PathLike[str], method: str | None = None, *, isolated: bool | None = None
) -> OpenProgram:
    """Open a ``.pte``, ``.onnx``, ``.xml`` or ``.pt2`` file, whoever made it, to run it on this machine.

    ``method``: which one of a ``.pte``; "forward" unless given. ``isolated``: whether the file is run in a process of
    its own, so that one that crashes its runtime raises here. None: where it is a file for a runtime and carries no
    checksum of ours (`OpenProgram.unchanged`).

    Raises `FileFormatError` for a file of another kind, for one that was damaged or edited since it was written, and
    for one that ends the process it was opened in; `LoweringError` when its runtime is not installed or cannot run it;
    OSError when it cannot be read.
    """
    source = read_program(Path(path))
    if isolated is None:
        isolated = not source.unchanged and source.path.suffix != ".pt2"
    if not isolated:
        return opened(source, method)
    child = ChildProgram(source.path, method)
    return OpenProgram(
        path=source.path,
        inputs=child.inputs,
        call=child,
        example=child.example,
        unchanged=child.unchanged if source.path.suffix == ".pt2" else source.unchanged,
        isolated=True,
    )


def opened(source: ProgramBytes, method: str | None = None) -> OpenProgram:
    """A program in this process. Raises `FileFormatError`, `LoweringError`."""
    if source.package is not None:
        return _open_package(source, source.package)
    kinds = {".pte": _open_pte, ".onnx": _open_onnx, ".xml": _open_openvino, ".pt2": _open_pt2}
    return kinds[source.path.suffix](source, method)


def _open_pte(source: ProgramBytes, method: str | None) -> OpenProgram:
    from lowering.executorch.runtime import input_tensors, load_method, load_program

    path, method = source.path, method or "forward"
    program = load_program(source.content)
    if method not in program.method_names:
        names = ", ".join(sorted(program.method_names))
        raise LoweringError(f"{path} has no method '{method}'; its methods are {names}: choose one with --method")
    inputs = input_tensors(program, method)
    loaded = load_method(program, method)

    def call(tensors: Sequence[Tensor], _owner: object = program) -> Sequence[Any]:
        # the program, which owns what its methods run on, lives as long as this function
        outputs: Sequence[Any] = loaded.execute(list(tensors))
        return outputs

    return OpenProgram(path=path, inputs=inputs, call=call, unchanged=source.unchanged)


def _open_onnx(source: ProgramBytes, _: str | None) -> OpenProgram:
    from lowering.onnx.session import run, session, tensor_inputs

    loaded = session(source.content if source.unchanged else source.path)
    inputs = tensor_inputs(loaded)
    return OpenProgram(
        path=source.path,
        inputs=inputs,
        call=lambda tensors: run(loaded, tensors),
        example=_of_small_sizes(inputs),
        unchanged=source.unchanged,
    )


def _of_small_sizes(inputs: Sequence[TensorInput]) -> tuple[Tensor, ...]:
    """Noise for inputs of which the file need not say the largest size."""
    return tuple(_noise(replace(one, sizes=tuple((low, max(low, 1)) for low, _ in one.sizes))) for one in inputs)


def _open_openvino(source: ProgramBytes, _: str | None) -> OpenProgram:
    from lowering.openvino.session import open_model

    loaded = open_model(source.content, source.weights, source.path)
    return OpenProgram(
        path=source.path,
        inputs=loaded.inputs,
        call=loaded.run,
        example=_of_small_sizes(loaded.inputs),
        unchanged=source.unchanged,
    )


def _open_package(source: ProgramBytes, record: PackageRecord) -> OpenProgram:
    from lowering.inductor.package_file import load_package

    loaded: Any = load_package(source.path)
    formats = [torch.channels_last if one.channels_last else torch.contiguous_format for one in record.inputs]

    def call(tensors: Sequence[Tensor]) -> Sequence[Any]:
        placed = [laid_out(tensor, layout) for tensor, layout in zip(tensors, formats, strict=True)]
        outputs: Sequence[Any] = loaded.loader.boxed_run(placed)
        return outputs

    bounds = [tuple((size[0], size[-1]) for size in one.sizes) for one in record.inputs]
    inputs = tuple(
        TensorInput(name=one.name, dtype=one.dtype, sizes=own) for one, own in zip(record.inputs, bounds, strict=True)
    )
    # of a size that varies without bound, the largest is none to run with
    sizes = [tuple((low, high if high < _HUGE else max(low, 1)) for low, high in one.sizes) for one in inputs]
    example = tuple(_noise(replace(one, sizes=own)) for one, own in zip(inputs, sizes, strict=True))
    return OpenProgram(path=source.path, inputs=inputs, call=call, example=example, unchanged=source.unchanged)


_HUGE = 1 << 31


def _open_pt2(source: ProgramBytes, _: str | None) -> OpenProgram:
    from quant2e.quantized_model import load

    path = source.path
    model: QuantizedModel = load(path)
    leaves, spec = pytree.tree_flatten((model.example_inputs, model.example_kwargs))
    if not leaves:
        raise FileFormatError(
            f"{path} holds no example inputs, so nothing says what it takes: save it with quant2e.save"
        )
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    dynamic = model.dynamic_shapes is not None

    def call(tensors: Sequence[Tensor]) -> Sequence[Any]:
        values = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        args, kwargs = pytree.tree_unflatten(values, spec)
        with torch.no_grad():
            return pytree.tree_leaves(model(*args, **kwargs))

    example = tuple(leaves[place] for place in places)
    inputs = tuple(_like(f"input {index}", tensor, dynamic=dynamic) for index, tensor in enumerate(example))
    unchanged = NOT_HASHED not in model.report.notes
    return OpenProgram(path=path, inputs=inputs, call=call, example=example, unchanged=unchanged)


def _like(name: str, tensor: Tensor, *, dynamic: bool) -> TensorInput:
    # which sizes vary is the graph's own knowledge: it checks them on each call
    sizes = tuple((0, 1 << 62) if dynamic else (size, size) for size in tensor.shape)
    return TensorInput(name=name, dtype=tensor.dtype, sizes=sizes)
