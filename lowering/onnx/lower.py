"""Lowering to ONNX: a Q/DQ graph becomes a file, run in onnxruntime and compared with the graph it came from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule

from lowering.bounds import calls_at_bounds
from lowering.check import checked
from lowering.choices import Lower
from lowering.control_flow import refuse_integers_inside
from lowering.export import Lowerable, dynamic_shapes_of, export, graph_of, needed_example_of, refuse_dtypes
from lowering.io_parameters import constants
from lowering.onnx.integer_types import sizes, use_integers
from lowering.onnx.program import OnnxProgram, OnnxReport, kernels_of, notes_on
from lowering.onnx.qdq_form import CONVENTIONS, in_form
from lowering.onnx.session import import_onnxruntime
from lowering.onnx.translation import OPSET, OPSETS, in_opset, translations
from lowering.rewrites.layouts import contiguous_call
from lowering.signature import signature_of
from quant2e.checksum import BLANK, WORD, sealed
from quant2e.errors import LoweringError, where
from quant2e.files import atomic_file
from quant2e.graph.captured.calls import Call, call_of
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.data_movement import When, movements
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.mutation import first_writer, written_attributes
from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from quant2e.isolation import quietly, tracing
from quant2e.quantized_io import QuantizedIO, quantized_io_of
from quant2e.stages import quiet_where_told, stage

OTHERWISE = "Lower the model with to_inductor or to_executorch instead"
"""What to do with a wrong file, where no op is to blame that could be left in float."""

_PROTOBUF_LIMIT = 2**31 - 1


@quiet_where_told
@stage("lower to ONNX")
@tracing()
def to_onnx(
    model: Lowerable,
    example_inputs: Any = None,
    *,
    path: str | os.PathLike[str],
    dynamic_shapes: Any = None,
    target: str = "onnxruntime",
    opset: int = OPSET,
    verify: bool = True,
    verify_inputs: Iterable[Any] = (),
    progress: bool | None = None,  # noqa: ARG001  # read by the decorator
) -> OnnxProgram:
    """Write a Q/DQ graph as an ONNX file with QuantizeLinear and DequantizeLinear.

    ``model``: a QuantizedModel (its example inputs and dynamic shapes are used unless given), a converted or captured
    GraphModule, or an nn.Module in eval mode. ``example_inputs``: a tuple of positional inputs, or a dict of keyword
    inputs. ``path``: of the file, which appears whole or not at all. ``dynamic_shapes``: as for ``torch.export``.
    ``target``: ``"onnxruntime"`` (u8 activations, s8 weights, int32 biases) or ``"tensorrt"`` (s8 with zero points of
    0, float biases; a graph that is not so is refused). ``opset``: the version of ONNX, 17 to 23. Before 21 it has no
    integers of 16 bits, and none of 4, so that weights of 4 bits take 8 in the file. ``verify``: run the file in
    onnxruntime on the example inputs, also with the smallest and largest sizes that vary, and on ``verify_inputs``,
    compare it with the Q/DQ graph, and list what ran on integers.
    A graph that takes or returns integers becomes a file that does; its metadata has their parameters, named as in a
    ``.pte`` file: ``forward_input0_scale`` and so on. ``progress``: False shows no stages on a terminal (see
    `quant2e.stages`).

    Raises `LoweringError`, before a file is written, when onnx, onnxscript or onnxruntime is missing, when the graph
    cannot be exported or held by the target, and when the file does not compute what its graph says.
    """
    if target not in CONVENTIONS:
        raise LoweringError(f"target {target!r}: to_onnx writes for {', '.join(map(repr, CONVENTIONS))}")
    if opset not in OPSETS:
        raise LoweringError(f"opset {opset!r}: to_onnx writes the versions {OPSETS[0]} to {OPSETS[-1]} of ONNX")
    reference = graph_of(model)
    inputs = needed_example_of(model, example_inputs, "to_onnx")
    shapes = dynamic_shapes_of(model, dynamic_shapes)
    with quietly("torch.onnx", "onnxscript", "onnx_ir"):
        _require(verify)
        module = export(reference, inputs, shapes).module(check_guards=False)
        assert isinstance(module, GraphModule)
        graph = reference if isinstance(reference, GraphModule) else copy_graph(module)
        _check_stateless(module)
        refuse_integers_inside(reference if isinstance(reference, GraphModule) else module, "to_onnx")
        refuse_dtypes(module, (torch.float16, torch.bfloat16), "onnxruntime")
        if opset < OPSET:
            _check_integers(module, opset)
        in_form(module, CONVENTIONS[target])
        if target == "onnxruntime":
            _check_computes(module)
        exported = export(module, contiguous_call(inputs), shapes)
        quantized_io = quantized_io_of(reference) if isinstance(reference, GraphModule) else QuantizedIO()
        with atomic_file(Path(path)) as part:
            signature, report = signature_of(exported), _write(exported, part, target, opset, quantized_io)
            if verify:
                in_file = OnnxProgram(part, report, signature)
                with tempfile.TemporaryDirectory() as folder:
                    options: dict[str, Any] = {"dynamic_shapes": shapes, "target": target, "opset": opset}
                    lower = partial(_lower_part, example=inputs, options=options, folder=Path(folder))
                    batches = [inputs, *calls_at_bounds(signature, inputs, reference), *map(call_of, verify_inputs)]
                    report = _verified(in_file, reference, batches, lower, graph)
    return OnnxProgram(Path(path), report, signature)


def _check_stateless(graph: GraphModule) -> None:
    """Raise `LoweringError` for a graph that writes to its buffers, naming them and what writes."""
    writer = first_writer(graph)
    if writer is None:
        return
    raise LoweringError(
        f"an ONNX file keeps nothing from one call to the next, and this graph writes to "
        f"{', '.join(sorted(written_attributes(graph)))}, as in {where(writer)}: let the model take its state as an "
        f"input and return the new one, or lower it with to_inductor or to_executorch, whose programs keep it"
    )


_CASTS = movements(when=When.SAME_DTYPE)
"""Ops that change a dtype, or nothing."""


def _check_computes(module: GraphModule) -> None:
    """Raise `LoweringError` naming an op that computes in bfloat16, in a region of autocast say: onnxruntime does not.

    Its CPU has no such kernels, and puts casts around the ops of float16 only.
    """
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            value = node_tensor(node) if isinstance(node.target, OpOverload) else None
            if value is not None and value.dtype is torch.bfloat16 and node.target not in _CASTS:
                raise LoweringError(
                    f"onnxruntime's CPU kernels do not compute in bfloat16, as {where(node)} does: capture the model "
                    f"in float32, model.float() and without autocast, or lower with to_inductor or to_executorch"
                )


def _check_integers(module: GraphModule, opset: int) -> None:
    """Raise `LoweringError` naming what is quantized to integers that this version of ONNX does not have."""
    wide = [
        f"{where(node)} is {str(dtype).removeprefix('torch.')}"
        for node in module.graph.nodes
        if (dtype := operand(node, "dtype")) in (torch.int16, torch.uint16)
        and node.target in QUANTIZE | DEQUANTIZE | CHOOSE_QPARAMS
    ]
    if wide:
        more = f"; … {len(wide) - 5} more" * (len(wide) > 5)
        raise LoweringError(
            f"ONNX has integers of 16 bits from opset {OPSET} on, not in {opset}: {'; '.join(wide[:5])}{more}. "
            f"Write opset {OPSET}, or quantize to 8 bits"
        )


def _write(exported: ExportedProgram, part: Path, target: str, opset: int, quantized_io: QuantizedIO) -> OnnxReport:
    from onnxscript import ir

    onnx_model = _to_onnx_ir(exported, opset)
    use_integers(onnx_model, unsigned=CONVENTIONS[target].unsigned, four_bits=opset >= OPSET)
    held = sizes(onnx_model)
    if sum(held.values()) > _PROTOBUF_LIMIT:
        raise LoweringError(f"the constants have {sum(held.values()):,} bytes; an ONNX file holds 2 GiB")
    onnx_model.metadata_props["quant2e.target"] = target
    onnx_model.metadata_props[WORD] = BLANK
    onnx_model.metadata_props.update({name: str(value) for name, value in constants("forward", quantized_io).items()})
    ir.save(onnx_model, part)
    part.write_bytes(sealed(part.read_bytes()))
    return OnnxReport(opset=opset, convention=target, size=part.stat().st_size, constants=held)


def _to_onnx_ir(exported: ExportedProgram, opset: int) -> Any:
    import torch.onnx

    try:
        with in_opset(opset):
            made = torch.onnx.export(
                exported, dynamo=True, opset_version=opset, verbose=False, custom_translation_table=translations()
            )
    except Exception as error:
        raise LoweringError(f"torch.onnx cannot export this graph: {error}") from error
    assert made is not None
    if (found := made.model.opset_imports.get("")) != opset:
        raise LoweringError(f"torch.onnx cannot write this graph in opset {opset}, only in {found}: pass opset={found}")
    return made.model


def _lower_part(part: GraphModule, *, example: Call, options: dict[str, Any], folder: Path) -> OnnxProgram:
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    return to_onnx(part, example, path=path, verify=False, **options)


def _verified(
    program: OnnxProgram, reference: Any, batches: list[Call], lower: Lower, graph: GraphModule
) -> OnnxReport:
    """The report with what ran on integers and the comparison; raises `LoweringError` beyond the bound."""
    verification = checked("the ONNX file", program, reference, batches, lower, graph=graph, otherwise=OTHERWISE)
    if program.report.convention != "onnxruntime":
        note = f"compared in onnxruntime; {program.report.convention} was not run here"
        return replace(program.report, verification=verification, notes=(note,))
    kernels, floats = kernels_of(program.path)
    return replace(
        program.report,
        verification=verification,
        integer_kernels=kernels,
        float_products=floats,
        notes=notes_on(kernels),
    )


def _require(verify: bool) -> None:
    """Import what is needed; raise `LoweringError` when it is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401

        if verify:
            import_onnxruntime()
    except ImportError as error:
        raise LoweringError(f"ONNX export needs {error.name}: pip install quant2e[onnx]") from error
