"""ONNX graphs: what a runtime that reads ONNX is given, in memory, with what a program of it is compared with.

Q/DQ graph ─▶ refused, where ONNX cannot hold it ─▶ form of the runtime ─▶ an ``onnx_ir.Model``
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule

from lowering.control_flow import refuse_integers_inside
from lowering.export import Lowerable, dynamic_shapes_of, export, needed_example_of, plain_graph_of, refuse_dtypes
from lowering.onnx.integer_types import sizes, use_integers
from lowering.onnx.qdq_form import Convention, in_form
from lowering.onnx.translation import OPSET, in_opset, translations
from lowering.rewrites.layouts import contiguous_call
from lowering.signature import Signature, signature_of
from quant2e.errors import LoweringError, where
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.data_movement import When, movements
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.mutation import first_writer, written_attributes
from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from quant2e.quantized_io import QuantizedIO, quantized_io_of

_PROTOBUF_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Who asks for a graph, as errors say it. ``call``: the function; ``file``: what it writes, with an article;
    ``runtime``: what runs that; ``alternatives``: functions that lower otherwise.
    """

    call: str
    file: str
    runtime: str
    alternatives: str = "to_inductor or to_executorch"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxGraph:
    """``model``: an ``onnx_ir.Model``; ``signature``: how it is called; ``quantized_io``: of its integers in and out.

    ``reference``: what was lowered, and ``graph``: that as a graph, of ops that ONNX has; ``example``, ``shapes``: what
    it was exported with.
    """

    model: Any
    signature: Signature
    quantized_io: QuantizedIO
    reference: Any
    graph: GraphModule
    example: Call
    shapes: Any


def onnx_graph(
    model: Lowerable,
    example_inputs: Any,
    dynamic_shapes: Any,
    *,
    convention: Convention,
    asker: Asker,
    require: Callable[[], None],
    opset: int = OPSET,
    computes: bool = True,
) -> OnnxGraph:
    """A model in ONNX, in the form of a runtime. Arguments that are not named here: as of `to_onnx`.

    ``require``: raises where a package is missing. ``computes``: the runtime is run here, so its kernels have to take
    the dtypes of the graph. Raises `LoweringError` for a graph that cannot be exported, or that ONNX cannot hold.
    """
    reference = plain_graph_of(model)
    inputs = needed_example_of(model, example_inputs, asker.call)
    shapes = dynamic_shapes_of(model, dynamic_shapes)
    require()
    module = export(reference, inputs, shapes).module(check_guards=False)
    assert isinstance(module, GraphModule)
    graph = reference if isinstance(reference, GraphModule) else copy_graph(module)
    _check_stateless(module, asker)
    _check_bags(module, asker)
    refuse_integers_inside(reference if isinstance(reference, GraphModule) else module, asker.call)
    refuse_dtypes(module, (torch.float16, torch.bfloat16), asker.runtime)
    if opset < OPSET:
        _check_integers(module, opset)
    in_form(module, convention)
    if computes:
        _check_computes(module, asker)
    exported = export(module, contiguous_call(inputs), shapes)
    made = _to_onnx_ir(exported, opset, convention)
    use_integers(made, unsigned=convention.unsigned_weights, four_bits=opset >= OPSET, run_time=convention.run_time_ops)
    held = sum(sizes(made).values())
    if held > _PROTOBUF_LIMIT:
        raise LoweringError(f"the constants have {held:,} bytes; an ONNX file holds 2 GiB")
    return OnnxGraph(
        model=made,
        signature=signature_of(exported),
        quantized_io=quantized_io_of(reference) if isinstance(reference, GraphModule) else QuantizedIO(),
        reference=reference,
        graph=graph,
        example=inputs,
        shapes=shapes,
    )


def _check_stateless(graph: GraphModule, asker: Asker) -> None:
    """Raise `LoweringError` for a graph that writes to its buffers, naming them and what writes."""
    writer = first_writer(graph)
    if writer is None:
        return
    raise LoweringError(
        f"{asker.file} keeps nothing from one call to the next, and this graph writes to "
        f"{', '.join(sorted(written_attributes(graph)))}, as in {where(writer)}: let the model take its state as an "
        f"input and return the new one, or lower it with {asker.alternatives}, whose programs keep it"
    )


_BAGS = (torch.ops.aten.embedding_bag.default, torch.ops.aten.embedding_bag.padding_idx)


def _check_bags(graph: GraphModule, asker: Asker) -> None:
    """Raise `LoweringError` where something reads more of a bag than its sums: torch.onnx writes zeros for the rest."""
    for node in graph.graph.nodes:
        if node.target in _BAGS and not all(
            user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users
        ):
            raise LoweringError(
                f"{asker.file} holds the first result of {where(node)} only, the values of the bags, and the graph "
                f"reads others of its four: leave those out, or lower with {asker.alternatives}"
            )


_CASTS = movements(when=When.SAME_DTYPE)
"""Ops that change a dtype, or nothing."""


def _check_computes(module: GraphModule, asker: Asker) -> None:
    """Raise `LoweringError` naming an op that computes in bfloat16, in a region of autocast say: no runtime here does.

    onnxruntime's CPU has no such kernels, and puts casts around the ops of float16 only; OpenVINO's computes in the
    precision that it was compiled for, whatever the graph says.
    """
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            value = node_tensor(node) if isinstance(node.target, OpOverload) else None
            if value is not None and value.dtype is torch.bfloat16 and node.target not in _CASTS:
                raise LoweringError(
                    f"{asker.runtime}'s CPU kernels do not compute in bfloat16, as {where(node)} does: capture the "
                    f"model in float32, model.float() and without autocast, or lower with {asker.alternatives}"
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


def _to_onnx_ir(exported: ExportedProgram, opset: int, convention: Convention) -> Any:
    import torch.onnx

    try:
        with in_opset(opset):
            made = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                custom_translation_table=translations(run_time_ops=convention.run_time_ops),
            )
    except Exception as error:
        raise LoweringError(f"torch.onnx cannot export this graph: {error}") from error
    assert made is not None
    if (found := made.model.opset_imports.get("")) != opset:
        raise LoweringError(f"torch.onnx cannot write this graph in opset {opset}, only in {found}: pass opset={found}")
    return made.model


def model_bytes(model: Any) -> bytes:
    """An ``onnx_ir.Model`` as the bytes of a file."""
    from onnxscript import ir

    content: bytes = ir.serde.serialize_model(model).SerializeToString()
    return content


def require_onnx(what: str, extra: str) -> None:
    """Import what graphs are made with. Raises `LoweringError` that names the extra to install."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise LoweringError(f"{what} needs {error.name}: pip install quant2e[{extra}]") from error
