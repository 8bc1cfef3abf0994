"""InductorProgram: a Q/DQ graph as a compiled callable, on Inductor's int8 kernels (oneDNN on x86).

rewrite a copy of the graph (`Rewritten`) ─▶ compile ─▶ run against the graph
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from lowering.export import Lowerable
from lowering.inductor.compile import FakeInputs, Flat, compile_flat, compile_step, explained_run
from lowering.inductor.kernel_selection import Engines
from lowering.inductor.package import write_package
from lowering.inductor.pipeline import Rewritten
from lowering.inductor.report import InductorReport, int8_kernels
from lowering.inductor.source import InductorSource, chosen_in, source_of, verified
from lowering.inductor.warm import warm_calls
from lowering.program import LoweredProgram
from lowering.state import State, state_of
from quant2e.errors import LoweringError
from quant2e.graph.captured.calls import Call
from quant2e.graph.mutation import written_attributes
from quant2e.isolation import tracing
from quant2e.stages import quiet_where_false, stage

LOG = logging.getLogger(f"quant2e.{__name__}")


class InductorProgram(LoweredProgram[InductorReport]):
    """A compiled model. Call it like the model it came from: same inputs, same outputs, no gradients.

    ``report``: which quantized ops became int8 kernels, and why the others did not; and how far the program is from its
    Q/DQ graph.

    Sizes are those the graph was captured with, except along dynamic dimensions. Where Inductor made an assumption
    on a dynamic size that an input does not meet (a batch of one, say), the program is compiled again for exactly
    that size, once, with the same flags. ``to_inductor(warm=...)`` does that ahead.
    """

    def __init__(self, source: InductorSource, engines: Engines = "measured") -> None:
        self._source = source
        self._engines = engines
        self._rewritten = Rewritten(source.graph, engines)
        self._signature = source.signature
        self._inputs = FakeInputs(self._signature.inputs, self._signature.symbols)
        self._runs: dict[tuple[int, ...], Flat] = {}
        self._start = state_of(self._rewritten.graph)
        kernels = [kernel for step in self._rewritten.steps for kernel in compile_step(step)]
        self._general = self._compile(self._inputs, lambda graph: kernels.extend(int8_kernels(graph)))
        self._report = self._rewritten.report(kernels)

    @property
    def report(self) -> InductorReport:
        return self._report

    @property
    def initial_state(self) -> State:
        return self._source.state

    def _exchange_state(self, state: State | None) -> State:
        before = state_of(self._rewritten.graph)
        with torch.no_grad():
            for path, tensor in written_attributes(self._rewritten.graph).items():
                tensor.copy_((state or self._start)[path])
        return before

    def continue_from(self, other: InductorProgram) -> None:
        """Go on where ``other`` is, a program that writes to buffers of the same names: a prompt's cache, say.

        Raises `LoweringError` for a program that writes to others.
        """
        own, theirs = (written_attributes(program._rewritten.graph) for program in (self, other))
        if own.keys() != theirs.keys():
            raise LoweringError(f"one program writes to {sorted(own)}, and the other to {sorted(theirs)}")
        with torch.no_grad():
            for path, tensor in own.items():
                tensor.copy_(theirs[path])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program. Raises `LoweringError` when the inputs are not what the graph was captured for."""
        values = self._signature.flatten(args, kwargs)
        sizes = self._signature.sizes(values)
        run = self._run_for(sizes, values)
        laid_out = zip(self._signature.inputs, self._signature.laid_out(values), strict=True)
        with torch.no_grad(), explained_run(values):
            return self._signature.unflatten(run(*[value for spec, value in laid_out if spec.taken]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Compile the same graph ahead of time into a package, as `package_inductor` does; ``path`` ends in ``.pt2``.

        A program that was compared with its graph is compared again, as it stands in the file.
        """
        with stage("package with Inductor"), tracing():
            write_package(self._source, Path(path), self._engines, verify=self.verification is not None)

    def _compile_ahead(self, calls: Iterable[Call]) -> None:
        """Have code for the sizes of each call; notes of the report name those that needed code of their own."""
        for call in calls:
            values = self._signature.flatten(*call)
            sizes = self._signature.sizes(values)
            if self._run_for(sizes, values) is not self._general:
                note = f"compiled ahead for {self._named(sizes)}, which the code for any size does not take"
                notes = dict.fromkeys((*self._report.notes, note))
                self._report = replace(self._report, notes=tuple(notes))

    def _verify(self, batches: Iterable[Any]) -> None:
        graph, what = self._source.graph, "the program that Inductor made"
        calls = self._source.batches(batches, self._inputs.accept)
        found = verified(self, graph, calls, what, self._lower_part)
        self._report = replace(self._report, verification=found)

    def _lower_part(self, part: GraphModule) -> InductorProgram:
        return InductorProgram(self._source.part(part), chosen_in(part, self._report))

    def _run_for(self, sizes: tuple[int, ...], values: Sequence[Any]) -> Flat:
        run = self._runs.get(sizes)
        if run is None:
            with tracing():
                run = self._runs[sizes] = self._runs.get(sizes) or self._program_for(sizes, values)
        return run

    def _named(self, sizes: tuple[int, ...]) -> str:
        names = self._signature.size_names.values()
        return ", ".join(f"{name} = {size}" for name, size in zip(names, sizes, strict=True))

    def _program_for(self, sizes: tuple[int, ...], values: Sequence[Any]) -> Flat:
        if self._inputs.accept(sizes):
            return self._general
        named = self._named(sizes)
        LOG.info("the program is compiled again, once, for %s, which it took for granted not to be", named)
        with stage(f"compile again for {named}"):
            return self._compile(FakeInputs(self._signature.at(values), {}), lambda _: None)

    def _compile(self, inputs: FakeInputs, inspect: Callable[[Graph], None]) -> Flat:
        return compile_flat(self._rewritten.flat(self._signature), inputs.values, inspect)


@quiet_where_false
@stage("compile with Inductor")
@tracing()
def to_inductor(
    model: Lowerable,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    verify: bool = True,
    verify_inputs: Iterable[Any] = (),
    warm: Iterable[Any] = (),
    engines: Engines = "measured",
    progress: bool | None = None,  # noqa: ARG001  # read by the decorator
) -> InductorProgram:
    """Compile a quantized model with Inductor.

    ``model``: a QuantizedModel, or a captured GraphModule (Q/DQ or float). ``example_inputs``: a tensor, a tuple of
    positional inputs or a dict of keyword inputs; those of the QuantizedModel by default. ``dynamic_shapes``: as in
    ``torch.export``; needed only where the graph was captured without them. ``verify``: run the program and the
    graph on the example inputs, also with the smallest and largest sizes that vary, and on ``verify_inputs``, and raise
    when they differ by more than `BOUND` allows.
    ``warm``: what will be called, so that no such call has to compile the program again: sizes, as ``[1, 16]`` where
    one varies, or ``[{"x.shape[0]": 1, "x.shape[1]": 7}]``, or inputs as in ``verify_inputs``. The program is compared
    at each of them as well.
    ``engines``: what computes each product. ``"measured"`` times the engines on each shape, on this machine;
    ``"onednn"`` and ``"float"`` are one engine for all; a dict from op names to engines decides for those ops.
    The report has the choices and the times. ``progress``: False shows no stages on a terminal (see `quant2e.stages`).

    The model is left as it is, and so is every setting of torch: Inductor's flags are set for the compilations alone.
    Raises `LoweringError` when the graph cannot be compiled, or computes something else once it is.
    """
    source = source_of(model, example_inputs, dynamic_shapes, "to_inductor")
    calls = warm_calls(warm, source)
    program = InductorProgram(source, engines)
    program._compile_ahead(calls)
    if verify:
        program._verify((*calls, *verify_inputs))
    return program
