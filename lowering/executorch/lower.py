"""Lowering to ExecuTorch.

Q/DQ graphs ─▶ legal form ─▶ limits checked ─▶ ExecuTorch's partitioners ─▶ a program, run and compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from lowering.bounds import calls_at_bounds, kept_ranges
from lowering.check import checked
from lowering.choices import Lower
from lowering.control_flow import notes_on_branches, refuse_control_flow
from lowering.executorch.bodies import decompose_bodies
from lowering.executorch.program import ExecuTorchProgram, LoadedFile, Method
from lowering.executorch.report import ExecuTorchReport, Rejections, report_on
from lowering.executorch.runtime import check_program, require_executorch, unavailable_backends
from lowering.executorch.xnnpack.legalize import DECLARED, EXACT, SPELLED, legalize
from lowering.executorch.xnnpack.limits import beside_float16, check_limits
from lowering.executorch.xnnpack.partitioner import (
    is_xnnpack,
    refuse_freed_tables,
    refuse_growing_means,
    xnnpack_partitioner,
)
from lowering.export import (
    Lowerable,
    drop_from_node,
    dynamic_shapes_of,
    export,
    needed_example_of,
    plain_graph_of,
    refuse_dtypes,
    refuse_written_inputs,
    untraceable,
)
from lowering.io_parameters import constants, quantized_io_in
from lowering.own_noise import LEEWAY_DB
from lowering.rewrites import apply
from lowering.rewrites.embedding import gather_then_dequantize
from lowering.rewrites.embedding_bag import decompose_embedding_bags
from lowering.rewrites.experts import EXPERTS
from lowering.rewrites.layouts import PLAIN_LAYOUTS, contiguous_call
from lowering.signature import Signature, check_bounded, signature_of
from lowering.state import State, state_of
from lowering.verify import Bound, verify_calls
from quant2e.checksum import BLANK, WORD, sealed
from quant2e.errors import LoweringError
from quant2e.graph.captured.calls import Call, call_of
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.effects import is_in_place
from quant2e.isolation import quietly, tracing
from quant2e.passes import Pass
from quant2e.quantized_io import QuantizedIO, quantized_io_of
from quant2e.stages import quiet_where_false, stage

FORWARD = "forward"
"""Name of the method of a program made of one model."""

OTHERWISE = "With partitioners=[] every op runs on ExecuTorch's own kernels, without XNNPACK"
"""What to do with a wrong program, where no op is to blame that could be left in float."""

PORTABLE: tuple[Pass, ...] = (*PLAIN_LAYOUTS, *EXPERTS, decompose_embedding_bags, gather_then_dequantize)
"""What every ExecuTorch target needs: contiguous tensors; no kernel is for bags or experts, and a table stays integers
in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """One method on its way: what it came from, as it was given and as a graph, and the legal graph with what was done.

    ``per_row``: the graph with a scale per row of dynamic activations, where there are any.
    """

    reference: Any
    graph: GraphModule
    example: Call
    shapes: Any
    exported: ExportedProgram
    signature: Signature
    per_row: GraphModule | None
    rewrites: Mapping[str, int]
    notes: tuple[str, ...]
    quantized_io: QuantizedIO
    state: State


@quiet_where_false
@stage("lower to ExecuTorch")
@tracing()
def to_executorch(
    model: Lowerable | Mapping[str, Lowerable],
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    partitioners: Sequence[Any] | None = None,
    verify: bool = True,
    verify_inputs: Iterable[Any] = (),
    progress: bool | None = None,  # noqa: ARG001  # read by the decorator
) -> ExecuTorchProgram:
    """Lower a Q/DQ graph to an ExecuTorch program.

    ``model``: a QuantizedModel (its example inputs and dynamic shapes are used unless given), a converted or captured
    GraphModule, or an nn.Module in eval mode. ``example_inputs``: a tuple of positional inputs, or a dict of keyword
    inputs. ``dynamic_shapes``: as for ``torch.export``; every dynamic size needs an upper bound.
    Several methods in one file: a dict of models by method name, and a dict by the same names for every other argument
    that differs between them; tensors that methods share are stored once.
    ``partitioners``: ExecuTorch partitioners in order of preference; XNNPACK's when None. Where all of them delegate to
    XNNPACK (by the id of their backend), the graph is brought into XNNPACK's legal form and held to its limits; any
    other partitioner sees the ops of the model whole.
    A graph that takes or returns integers (`quant2e.with_quantized_io`) becomes a program that does, and the file
    publishes their parameters: see ``program.constants``.
    ``verify``: run the program in the runtime on the example inputs, also with the smallest and largest sizes that
    vary, and on ``verify_inputs``, and compare it with the Q/DQ graph. Raises `LoweringError` when ExecuTorch is
    missing, when the graph holds what the target cannot run, when an op has no kernel in the runtime, and when the
    program disagrees with its graph. ``progress``: False shows no stages on a terminal (see `quant2e.stages`).
    """
    given = {
        "example_inputs": example_inputs,
        "dynamic_shapes": dynamic_shapes,
        "verify_inputs": verify_inputs,
    }
    per_method = _per_method(model, given)
    with quietly():
        require_executorch()
        chosen = list(partitioners) if partitioners is not None else [xnnpack_partitioner()]
        xnnpack = is_xnnpack(chosen)
        with stage("legal form"):
            prepared = {
                name: _prepare(one["model"], one["example_inputs"], one["dynamic_shapes"], xnnpack=xnnpack)
                for name, one in per_method.items()
            }
        with stage("delegate"):
            program, unavailable = _lower(prepared, chosen)
    if verify and unavailable:
        raise LoweringError(
            f"the program needs {', '.join(unavailable)}, which the ExecuTorch runtime of this "
            "process does not have, so "
            f"it cannot be compared with its Q/DQ graph here: install the backend, or pass verify=False"
        )
    if verify:
        for name, method in program.methods.items():
            with stage("compare with the graph"):
                method.report = _verified(method, prepared[name], per_method[name]["verify_inputs"], partitioners)
    return program


def _per_method(model: Lowerable | Mapping[str, Lowerable], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was given, by method. For several methods, a dict with their names is one value for each."""
    if not isinstance(model, Mapping):
        return {FORWARD: {"model": model, **given}}
    names: list[Any] = list(model)
    if not names or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise LoweringError(f"methods are named by identifiers, not {names}")
    found: dict[str, dict[str, Any]] = {name: {"model": model[name]} for name in names}
    for argument, value in given.items():
        split = isinstance(value, Mapping) and set(value) <= set(names)
        if isinstance(value, Mapping) and not split:
            raise LoweringError(
                f"{argument} has the keys {list(value)}; for several methods it is given by their names {names}"
            )
        for name in names:
            found[name][argument] = value.get(name, _DEFAULTS[argument]) if split else value
    return found


_DEFAULTS: Mapping[str, Any] = {
    "example_inputs": None,
    "dynamic_shapes": None,
    "verify_inputs": (),
}


def _prepare(model: Any, example_inputs: Any, dynamic_shapes: Any, *, xnnpack: bool) -> _Prepared:
    reference = plain_graph_of(model)
    example = needed_example_of(model, example_inputs, "to_executorch")
    shapes = dynamic_shapes_of(model, dynamic_shapes)
    exported = _functional(reference, example, shapes)
    check_bounded(exported)
    module, plain = exported.module(check_guards=False), contiguous_call(example)
    assert isinstance(module, GraphModule)
    graph = reference if isinstance(reference, GraphModule) else copy_graph(module)
    refuse_control_flow(module, ("cond", "scan", "map_impl"), "ExecuTorch", "Write a fixed number of steps as a scan")
    if xnnpack:
        refuse_dtypes(module, (torch.float16, torch.bfloat16), "XNNPACK", beside_float16(module))
    rewrites = legalize(module, EXACT) if xnnpack else apply(module, PORTABLE)
    notes = (*(check_limits(module) if xnnpack else ()), *notes_on_branches(module))
    declared = legalize(module, DECLARED) if xnnpack else {}
    per_row = copy_graph(module) if declared else None
    spelled = legalize(module, SPELLED) if xnnpack else {}
    decompose_bodies(module)
    known = quantized_io_of(reference) if isinstance(reference, GraphModule) else QuantizedIO()
    legal = _functional(module, plain, shapes)
    return _Prepared(
        reference=reference,
        graph=graph,
        example=example,
        shapes=shapes,
        exported=legal,
        signature=signature_of(legal),  # before partitioners take constants out of the program
        per_row=per_row,
        rewrites={**rewrites, **declared, **spelled},
        notes=notes,
        quantized_io=known or quantized_io_in(module),
        state=state_of(module),
    )


def _verified(
    method: Method, prepared: _Prepared, more: Iterable[Any], partitioners: Sequence[Any] | None
) -> ExecuTorchReport:
    """The report with the comparisons, on the example, at the ends of sizes that vary, and on ``more``.

    ``partitioners``: as given by the user, for lowering parts. Raises `LoweringError` when one is beyond its bound.
    """
    example = prepared.example
    # from the smallest sizes on, as memory that is planned for the first call must grow with the others
    batches = [*calls_at_bounds(prepared.signature, example, prepared.reference), example, *map(call_of, more)]
    options: dict[str, Any] = {"dynamic_shapes": prepared.shapes, "partitioners": partitioners}
    lower: Lower = partial(to_executorch, example_inputs=example, verify=False, **options)
    what = "the ExecuTorch program"
    if method.name != FORWARD:
        what = f"the method '{method.name}' of {what}"
    if prepared.per_row is None:
        reference, graph = prepared.reference, prepared.graph
        verification = checked(what, method, reference, batches, lower, graph=graph, otherwise=OTHERWISE)
        return replace(method.report, verification=verification)
    whole = f"{what} (reference: the graph with a scale per row of each dynamic activation)"
    rows = checked(whole, method, prepared.per_row, batches, lower, graph=prepared.per_row, otherwise=OTHERWISE)
    # the step from a scale per tensor to one per row is the target's; the program may add no more than its noise
    declared = verify_calls(prepared.per_row, prepared.reference, batches).sqnr_db
    bound = Bound(sqnr_db=min(rows.bound.sqnr_db, declared) - LEEWAY_DB)
    verification = verify_calls(method, prepared.reference, batches, bound=bound)
    verification.check(what)
    return replace(method.report, verification=verification, per_row=rows)


def _functional(module: Any, example: Call, dynamic_shapes: Any) -> ExportedProgram:
    """The graph exported, in-place ops as plain ones, and nothing decomposed."""
    exported = export(module, example, dynamic_shapes)
    try:
        with torch.no_grad():
            exported = exported.run_decompositions({}) if _writes(exported) else exported
    except Exception as error:
        raise untraceable(error) from error
    refuse_written_inputs(exported, "ExecuTorch")
    return exported


def _writes(exported: ExportedProgram) -> bool:
    return any(is_in_place(node) for node in exported.graph.nodes)


def _advice(error: Exception) -> str:
    """What to do about inputs or results that are nested in a type that torch does not write."""
    unnamed = re.search(r"No registered serialization name for (<class '[^']+'>)", str(error))
    if unnamed is None:
        return ""
    return (
        f"the model takes or returns {unnamed[1]}, which has no name in files: return a tuple in its place, such as "
        "tuple(x.max(-1)), or a dict"
    )


def _lower(prepared: Mapping[str, _Prepared], partitioners: Sequence[Any]) -> tuple[ExecuTorchProgram, list[str]]:
    """The program, and the backends it needs that do not work in this process."""
    from executorch.exir import to_edge_transform_and_lower

    published: dict[str, Any] = {}
    for name, one in prepared.items():
        refuse_growing_means(one.exported.graph, partitioners)
        drop_from_node(one.exported.graph)
        published |= constants(name, one.quantized_io)
    try:
        programs = {name: one.exported for name, one in prepared.items()}
        with kept_ranges(programs.values()), Rejections().listening("executorch.backends") as rejections:
            edge = to_edge_transform_and_lower(
                programs, partitioner=list(partitioners), constant_methods=published or None
            )
        for name in prepared:
            refuse_freed_tables(edge.exported_program(name).graph_module)
        reports = {
            name: report_on(edge.exported_program(name).graph_module, rejections.reasons, one.rewrites)
            for name, one in prepared.items()
        }
        for name in prepared:
            _write_initial_values(edge.exported_program(name))
        edge._named_data_store.add_named_data(WORD, BLANK.encode())
        with kept_ranges(map(edge.exported_program, prepared)):
            made = edge.to_executorch()
    except LoweringError:
        raise
    except Exception as error:
        raise LoweringError(_advice(error) or f"ExecuTorch cannot lower this graph: {error}") from error
    check_program(made.executorch_program)
    buffer = sealed(bytes(made.buffer))
    loaded = LoadedFile(buffer)
    methods = {
        name: Method(
            name,
            replace(reports[name], size=len(buffer), notes=one.notes),
            one.signature,
            one.quantized_io,
            loaded,
            one.state,
        )
        for name, one in prepared.items()
    }
    return ExecuTorchProgram(buffer, methods), unavailable_backends(made.executorch_program)


def _write_initial_values(exported: ExportedProgram) -> None:
    """Ask for the values of the buffers that calls write to: without that a file holds their sizes only, and zeros."""
    signature = exported.graph_signature
    written = set(signature.buffers_to_mutate.values())
    for node in exported.graph.nodes:
        if node.op == "placeholder" and signature.inputs_to_buffers.get(node.name) in written:
            node.meta["et_init_buffer"] = True
