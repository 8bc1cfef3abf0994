"""InductorPackage: the program of `to_inductor` compiled ahead of time, into a file that runs without this library.

rewrite a copy of the graph (`Rewritten`) ─▶ AOTInductor ─▶ load the file, run it against the graph ─▶ move it
into place
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from lowering.bounds import corners
from lowering.export import Lowerable
from lowering.inductor.compile import FakeInputs, explained_run, package_flat
from lowering.inductor.kernel_selection import Engines
from lowering.inductor.kernels.engines import ENGINES, WEIGHT_ONLY
from lowering.inductor.package_file import finished, load_package
from lowering.inductor.package_record import record_of_package
from lowering.inductor.pipeline import Rewritten
from lowering.inductor.report import InductorReport, Kernel, int8_kernels
from lowering.inductor.source import InductorSource, chosen_in, source_of, verified
from lowering.program import LoweredProgram
from lowering.signature import Signature
from lowering.state import State
from quant2e.errors import LoweringError
from quant2e.files import atomic_file
from quant2e.isolation import tracing
from quant2e.stages import quiet_where_false, stage


class InductorPackage(LoweredProgram[InductorReport]):
    """A package for AOTInductor. ``path``: where it is. Calling it runs the file.

    ``report``: which ops run as int8 kernels, what to know, and how far the program in the file is from its Q/DQ graph.
    """

    def __init__(self, path: Path, report: InductorReport, signature: Signature, state: State | None = None) -> None:
        self.path = path
        self._report = report
        self._signature = signature
        self._state = state or {}
        self._loaded: Callable[..., Any] | None = None

    @property
    def report(self) -> InductorReport:
        return self._report

    @property
    def initial_state(self) -> State:
        return self._state

    def _exchange_state(self, state: Callable[..., Any] | None) -> Callable[..., Any] | None:
        before, self._loaded = self._loaded, state
        return before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the package.

        Raises `LoweringError` when the inputs are not what the graph was captured for, and `FileFormatError` when the
        file has changed since it was written.
        """
        values = self._signature.flatten(args, kwargs)
        self._signature.sizes(values)
        if self._loaded is None:
            self._loaded = load_package(self.path)
        positional, keywords = self._signature.structured(self._signature.laid_out(values))
        with torch.no_grad(), explained_run(values):
            return self._loaded(*positional, **keywords)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copy the package to ``path``, which ends in ``.pt2``."""
        _check_suffix(Path(path))
        with atomic_file(Path(path)) as part:
            shutil.copyfile(self.path, part)


@quiet_where_false
@stage("package with Inductor")
@tracing()
def package_inductor(
    model: Lowerable,
    example_inputs: Any = None,
    *,
    path: str | os.PathLike[str],
    dynamic_shapes: Any = None,
    verify: bool = True,
    verify_inputs: Iterable[Any] = (),
    engines: Engines = "measured",
    progress: bool | None = None,  # noqa: ARG001  # read by the decorator
) -> InductorPackage:
    """Compile a quantized model ahead of time into a file for ``torch._inductor.aoti_load_package``.

    The process that loads the file needs torch alone, of the same version, on a CPU with the same instructions. Its
    inputs have the dtype, the sizes and the layout of the example (dynamic sizes: within their bounds, from 1 on); for
    others the call raises.

    ``path``: of the file, ending in ``.pt2``; it appears whole, after it was checked, or not at all. ``verify``: load
    the file, run it on the example inputs and on ``verify_inputs``, and with dynamic sizes on their smallest and
    largest values too, and compare it with the Q/DQ graph. The other arguments are those of `to_inductor`, and so are
    the graph and its kernels, but for kernels of our own (``weight_only``), which the process that loads the file does
    not have: there a product gets a float copy of its weight, and the report's notes say how much these take.

    Raises `LoweringError` when the graph cannot be compiled, takes or returns what a package cannot, or computes
    something else once it is compiled.
    """
    _check_suffix(Path(path))
    source = source_of(model, example_inputs, dynamic_shapes, "package_inductor")
    return write_package(source, Path(path), engines, verify=verify, verify_inputs=verify_inputs)


def write_package(
    source: InductorSource, path: Path, engines: Engines, *, verify: bool, verify_inputs: Iterable[Any] = ()
) -> InductorPackage:
    """`package_inductor`, of a graph that is at hand."""
    _check_suffix(path)
    _check_tensors(source.signature)
    known_to_torch = [engine for engine in ENGINES if engine.name != WEIGHT_ONLY]
    rewritten = Rewritten(source.graph, engines, known_to_torch, whole=True)
    inputs = FakeInputs(source.signature.inputs, source.signature.symbols, whole=True)
    kernels: list[Kernel] = []
    with atomic_file(path) as part:
        content = package_flat(
            rewritten.flat(source.signature),
            inputs.values,
            lambda graph: kernels.extend(int8_kernels(graph)),
            (source.signature.in_spec, source.signature.out_spec),
        )
        report = rewritten.report(kernels)
        part.write_bytes(finished(content, record_of_package(source, report)))
        compared: tuple[tuple[int, ...], ...] = ()
        if verify:
            example, *_ = batches = source.batches(verify_inputs)
            compared = corners(source.signature, source.signature.flatten(*example))
            in_file = InductorPackage(part, report, source.signature, source.state)
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                lower = partial(_lower_part, source=source, report=report, folder=Path(folder))
                found = verified(in_file, source.graph, batches, "the package", lower)
            report = replace(report, verification=found)
        report = replace(report, notes=(*report.notes, *_notes(source.signature, inputs, compared)))
        # only the record changes, which no loader looks at: it says now how the comparison went
        part.write_bytes(finished(content, record_of_package(source, report)))
    return InductorPackage(path, report, source.signature, source.state)


def _lower_part(part: GraphModule, *, source: InductorSource, report: InductorReport, folder: Path) -> InductorPackage:
    path = folder / f"{len(list(folder.iterdir()))}.pt2"
    return write_package(source.part(part), path, chosen_in(part, report), verify=False)


def _check_suffix(path: Path) -> None:
    if path.suffix != ".pt2":
        raise LoweringError(f"a package needs the path of the file to write, ending in .pt2, not {str(path)!r}")


def _check_tensors(signature: Signature) -> None:
    """Raise `LoweringError` for what a package cannot take or return."""
    for spec in signature.inputs:
        if isinstance(spec.value, torch.SymInt):
            raise LoweringError(
                f"input '{spec.name}' is a number that may vary, and packages take tensors: pass it as a tensor, or "
                f"capture the model with a fixed number"
            )
    if signature.fixed_outputs:
        raise LoweringError(
            f"the graph returns {', '.join(map(repr, signature.fixed_outputs))}, and packages return tensors only"
        )
    plain: set[Any] = {tuple, list, dict, OrderedDict, type(None)}
    found = {kind for spec in (signature.in_spec, signature.out_spec) for kind in _types(spec)} - plain
    if foreign := sorted(str(getattr(kind, "__name__", kind)) for kind in found):
        raise LoweringError(
            f"the model takes or returns {', '.join(foreign)}, which a process without its library does not have: wrap "
            f"the model in a module that takes and returns tensors in tuples, lists or dicts"
        )


def _types(spec: pytree.TreeSpec) -> Iterator[Any]:
    """Container types in a structure."""
    if not spec.is_leaf():
        yield spec.type
        for child in spec.children():
            yield from _types(child)


def _notes(signature: Signature, inputs: FakeInputs, compared: Sequence[tuple[int, ...]]) -> Iterator[str]:
    yield "the package checks dtype, sizes and strides of its inputs at each call"
    for spec in signature.inputs:
        if not isinstance(spec.value, Tensor):
            yield f"input '{spec.name}' is fixed to {spec.value!r}: what else is passed for it is ignored"
    if assumed := inputs.assumed(signature.size_names):
        sizes = ", ".join(signature.size_names.values())
        said = f"compared with the graph at ({sizes}) = {', '.join(map(str, compared))}" if compared else "not compared"
        yield f"Inductor took for granted that {', '.join(assumed)}; {said}"
