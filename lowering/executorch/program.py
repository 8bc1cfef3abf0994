"""A program for the ExecuTorch runtime, as a value: its bytes, its methods, what is known about each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lowering.executorch.io_parameters import constants
from lowering.executorch.report import Delegation
from lowering.executorch.runtime import load, load_method
from lowering.signature import Signature
from quant2e.errors import LoweringError
from quant2e.files import atomic_file
from quant2e.quantized_io import QuantizedIO


@dataclass(slots=True)
class _Loaded:
    """The bytes of a program, and the runtime's view of them once something is called."""

    buffer: bytes
    program: Any = None
    methods: dict[str, Any] = field(default_factory=dict)

    def method(self, name: str) -> Any:
        if self.program is None:
            self.program = load(self.buffer)
        if name not in self.methods:
            self.methods[name] = load_method(self.program, name)
        return self.methods[name]


class Method:
    """One entry of a program.

    ``report``: what was delegated, what was not and why, and how the method compares with its Q/DQ graph.
    ``boundary``: the inputs and outputs that carry integers, and their parameters. Calling it runs it in the ExecuTorch
    runtime of this process: it takes and returns what the model takes and returns.
    """

    def __init__(self, name: str, report: Delegation, signature: Signature, quantized_io: QuantizedIO) -> None:
        self.name = name
        self.report = report
        self.quantized_io = quantized_io
        self._signature = signature
        self._loaded: _Loaded | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on positional and keyword inputs; keywords in any order. Raises `LoweringError` on other inputs."""
        assert self._loaded is not None, "a method belongs to a program"
        flat = self._signature.flatten(args, kwargs)
        method = self._loaded.method(self.name)
        try:
            flat_outputs = method.execute(flat)
        except RuntimeError as error:
            shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in flat]
            raise LoweringError(f"the ExecuTorch runtime refused inputs {shapes}: {error}") from error
        return pytree.tree_unflatten(list(flat_outputs), self._signature.out_spec)


class ExecuTorchProgram:
    """A program for the ExecuTorch runtime.

    ``buffer``: the bytes of the ``.pte`` file. ``methods``: its entries by name; a program made of one model has one,
    "forward". Calling a program with one method calls that.
    """

    def __init__(self, buffer: bytes, methods: Mapping[str, Method]) -> None:
        self.buffer = buffer
        self.methods = dict(methods)
        loaded = _Loaded(buffer)
        for method in self.methods.values():
            method._loaded = loaded

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the only method. Raises `LoweringError` on other inputs, and when there are several methods."""
        return self._only()(*args, **kwargs)

    @property
    def report(self) -> Delegation:
        """The report of the only method; of several, each has its own: ``program.methods[name].report``."""
        return self._only().report

    @property
    def constants(self) -> Mapping[str, float | int]:
        """What the file publishes besides its methods, by the name of the constant method that returns it."""
        return {
            name: value
            for method in self.methods.values()
            for name, value in constants(method.name, method.quantized_io).items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ``.pte`` file. It appears whole or not at all: written under a temporary name, then moved."""
        with atomic_file(Path(path)) as part:
            part.write_bytes(self.buffer)

    def _only(self) -> Method:
        if len(self.methods) != 1:
            names = ", ".join(self.methods)
            raise LoweringError(f"this program has the methods {names}: choose one, as program.methods[name]")
        return next(iter(self.methods.values()))
