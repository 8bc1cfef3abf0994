"""NativeProgram: a Q/DQ graph at once, on our own int8 kernels: nothing is generated and compiled.

copy of the graph ─▶ constants computed ─▶ regions, each one op ─▶ what is left: weights as integers or floats ─▶ run
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from lowering.export import Lowerable
from lowering.inductor.compile import explained_run
from lowering.inductor.kernel_selection import choose
from lowering.inductor.kernels.engines import ENGINES, WEIGHT_ONLY, KernelChoice
from lowering.inductor.rewrites.graph import private_copy
from lowering.inductor.rewrites.weights import float_weight, weight_of
from lowering.inductor.source import InductorSource, source_of, verified
from lowering.native.cut import cut_regions
from lowering.native.kernels.op import instruction_set, load_region_op
from lowering.native.program.report import NativeReport, native_ops, native_regions
from lowering.program import LoweredProgram
from lowering.rewrites.constants import fold_constants
from lowering.state import State, state_of
from quant2e.errors import LoweringError
from quant2e.graph.constants import Constants
from quant2e.graph.mutation import written_attributes
from quant2e.graph.qdq_ops import DEQUANTIZE
from quant2e.isolation import tracing
from quant2e.passes.dead_code import remove_dead_code
from quant2e.quantized_model import QuantizedModel, save
from quant2e.stages import quiet_where_false, stage

_EAGER = frozenset({WEIGHT_ONLY, "float"})


class NativeProgram(LoweredProgram[NativeReport]):
    """A model whose int8 parts are one op each. Call it like the model it came from: same inputs, same outputs.

    ``report``: what runs in which region, and how far the program is from its Q/DQ graph. Nothing is compiled when it
    is called, whatever the sizes. Each thread that calls it keeps the memory of the largest region it ran.
    """

    def __init__(self, source: InductorSource, saved: Lowerable) -> None:
        self._source, self._saved = source, saved
        self._signature = source.signature
        original = private_copy(source.graph)
        self._graph = private_copy(source.graph)
        fold_constants(self._graph)
        cut = cut_regions(self._graph)
        choices = self._choose()
        self._graph.recompile()
        self._start = state_of(self._graph)
        regions = native_regions(cut.regions)
        name = "" if load_region_op() is None else instruction_set()
        self._report = NativeReport(
            instruction_set=name,
            regions=regions,
            ops=native_ops(original, regions, cut.refused),
            engines=choices,
            notes=_notes(name, choices),
        )

    def _choose(self) -> dict[str, KernelChoice]:
        """Weights of what is in no region: as integers where a kernel reads them so, else as floats, made now."""
        engines = tuple(engine for engine in ENGINES if engine.name in _EAGER)
        choices, _ = choose(self._graph, {}, "measured", engines)
        constants = Constants(self._graph.graph)
        for node in list(self._graph.graph.nodes):
            weight = weight_of(node)  # of a product that no engine knows, it would be dequantized at every call
            if weight in constants and weight is not None and weight.target in DEQUANTIZE:
                float_weight(self._graph, node)
        remove_dead_code(self._graph)
        return choices

    @property
    def report(self) -> NativeReport:
        return self._report

    @property
    def graph(self) -> GraphModule:
        """The graph as it runs: inputs and outputs are flat."""
        return self._graph

    @property
    def initial_state(self) -> State:
        return self._source.state

    def _exchange_state(self, state: State | None) -> State:
        before = state_of(self._graph)
        with torch.no_grad():
            for path, tensor in written_attributes(self._graph).items():
                tensor.copy_((state or self._start)[path])
        return before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program. Raises `LoweringError` when the inputs are not what the graph was captured for."""
        values = self._signature.flatten(args, kwargs)
        self._signature.sizes(values)
        with torch.no_grad(), explained_run(values):
            return self._signature.unflatten(list(self._graph(*values)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the quantized model, of which `to_native` makes this program on any machine in about a second.

        ``path`` ends in ``.pt2``: `quant2e.load` reads it, and so does ``torch.export.load``.
        """
        if not isinstance(self._saved, QuantizedModel | GraphModule):
            raise LoweringError(f"a {type(self._saved).__name__} is not saved: give to_native what quantize returned")
        example = self._source.example
        given = None if isinstance(self._saved, QuantizedModel) or example is None else example.args
        save(self._saved, os.fspath(path), given)

    def _verify(self, batches: Iterable[Any]) -> None:
        graph, what = self._source.graph, "the native program"
        found = verified(self, graph, self._source.batches(batches), what, self._lower_part)
        self._report = replace(self._report, verification=found)

    def _lower_part(self, part: GraphModule) -> NativeProgram:
        return NativeProgram(self._source.part(part), part)


def _notes(name: str, choices: Mapping[str, KernelChoice]) -> tuple[str, ...]:
    notes: Sequence[str] = ()
    if not name:
        notes = ("no C++ compiler was found (or QUANT2E_NATIVE=0 is set): every op runs by itself, in float",)
    floats = [op for op, choice in choices.items() if choice.engine == "float"]
    if floats:
        notes = (*notes, f"{len(floats)} product(s) outside of the regions compute in float, on a float weight")
    return tuple(notes)


@quiet_where_false
@stage("lower to native kernels")
@tracing()
def to_native(
    model: Lowerable,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    verify: bool = True,
    verify_inputs: Iterable[Any] = (),
    progress: bool | None = None,  # noqa: ARG001  # read by the decorator
) -> NativeProgram:
    """Make a program of a quantized model at once: its int8 parts run as one op each, on our own kernels.

    ``model``: a QuantizedModel, or a captured GraphModule. ``example_inputs``, ``dynamic_shapes``, ``verify``,
    ``verify_inputs``, ``progress``: as `lowering.to_inductor` takes them. What no kernel computes runs op by op,
    as torch does; `lowering.to_inductor` compiles that as well, and calls the same kernels.

    The kernels are built on the first use on a machine, in some seconds. Raises `LoweringError` when the graph cannot
    be lowered, or computes something else once it is.
    """
    source = source_of(model, example_inputs, dynamic_shapes, "to_native")
    program = NativeProgram(source, model)
    if verify:
        program._verify(verify_inputs)
    return program
