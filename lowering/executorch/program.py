"""ExecuTorchProgram: the bytes of a program, its methods, and what is known about each."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lowering.executorch.report import ExecuTorchReport, report_on_program
from lowering.executorch.runtime import load_method, load_program
from lowering.io_parameters import constants
from lowering.program import LoweredProgram
from lowering.signature import Signature
from lowering.state import KeepsState, State
from lowering.verify import Verification
from quant2e.errors import LoweringError
from quant2e.files import atomic_file
from quant2e.quantized_io import QuantizedIO


@dataclass(slots=True)
class LoadedFile:
    """The bytes of a program, and the runtime's view of them once something is called, by one thread at a time.

    Every method is loaded with a program of its own: a program loads each of its methods once, and what calls write to
    stays as they left it.
    """

    buffer: bytes
    methods: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    busy: threading.Lock = field(default_factory=threading.Lock)

    def execute(self, name: str, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run the method of that name. Raises RuntimeError where the runtime refuses the inputs."""
        with self.busy:  # a method has one place in memory for its inputs
            if name not in self.methods:
                program = load_program(self.buffer)
                self.methods[name] = program, load_method(program, name)
            outputs: Sequence[Any] = self.methods[name][1].execute(inputs)
        return outputs

    def exchange(self, name: str, loaded: Any) -> Any:
        """Put another load of a method, with the state it has, in place of this one, which is returned; None: a new."""
        with self.busy:
            before = self.methods.pop(name, None)
            if loaded is not None:
                self.methods[name] = loaded
            return before


class Method(KeepsState):
    """One entry of a program.

    ``report``: what was delegated, what was not and why, and how the method compares with its Q/DQ graph.
    ``quantized_io``: the inputs and outputs that carry integers, and their parameters. ``file``: runs the method on
    flat inputs. ``state``: what the method writes to, as it begins. Calling it takes and returns what the model takes
    and returns.
    """

    def __init__(
        self,
        name: str,
        report: ExecuTorchReport,
        signature: Signature,
        quantized_io: QuantizedIO,
        file: LoadedFile,
        state: State | None = None,
    ) -> None:
        self.name = name
        self.report = report
        self.quantized_io = quantized_io
        self._signature = signature
        self._file = file
        self._state = state or {}

    @property
    def verification(self) -> Verification | None:
        """How far the method is from its Q/DQ graph; None when that was not asked for."""
        return self.report.verification

    @property
    def initial_state(self) -> State:
        return self._state

    def _exchange_state(self, state: Any) -> Any:
        return self._file.exchange(self.name, state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on positional inputs and inputs by name, in any order. Raises `LoweringError` on other inputs."""
        flat = self._signature.plain(args, kwargs)
        try:
            flat_outputs = self._file.execute(self.name, flat)
        except RuntimeError as error:
            shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in flat]
            raise LoweringError(f"the ExecuTorch runtime refused inputs {shapes}: {error}") from error
        return pytree.tree_unflatten(list(flat_outputs), self._signature.out_spec)

    def __repr__(self) -> str:
        return self.report.summary(f"Method '{self.name}'")


class ExecuTorchProgram(LoweredProgram[ExecuTorchReport]):
    """A program for the ExecuTorch runtime.

    ``buffer``: the bytes of the ``.pte`` file. ``methods``: its entries by name; a program made of one model has one,
    "forward". Calling a program with one method calls that.
    """

    def __init__(self, buffer: bytes, methods: Mapping[str, Method]) -> None:
        self.buffer = buffer
        self.methods = dict(methods)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the only method. Raises `LoweringError` on other inputs, and when there are several methods."""
        if len(self.methods) != 1:
            names = ", ".join(self.methods)
            raise LoweringError(f"this program has the methods {names}: choose one, as program.methods[name]")
        (method,) = self.methods.values()
        return method(*args, **kwargs)

    @property
    def initial_state(self) -> State:
        """What the methods write to, as they begin; each method has its own, and of several each is named in front."""
        methods = self.methods.items()
        if len(methods) == 1:
            return next(iter(self.methods.values())).initial_state
        return {f"{name}.{path}": value for name, method in methods for path, value in method.initial_state.items()}

    def _exchange_state(self, state: Any) -> dict[str, Any]:
        return {name: method._exchange_state((state or {}).get(name)) for name, method in self.methods.items()}

    @property
    def report(self) -> ExecuTorchReport:
        """The report of the only method; of several, all of them summed up, and each in ``report.methods``."""
        return report_on_program({name: method.report for name, method in self.methods.items()})

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
