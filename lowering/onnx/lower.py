"""Lowering to ONNX: a Q/DQ graph becomes a file, run in onnxruntime and compared with the graph it came from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from lowering.export import Lowerable, dynamic_shapes_of, export, graph_of, needed_example_of
from lowering.io_parameters import constants
from lowering.onnx.integer_types import sizes, use_integers
from lowering.onnx.program import OnnxProgram, OnnxReport, kernels_of, notes_on
from lowering.onnx.qdq_form import CONVENTIONS, in_form
from lowering.onnx.translation import OPSET, translations
from lowering.signature import signature_of
from lowering.verify import compare_within_noise
from quant2e.checksum import BLANK, WORD, sealed
from quant2e.errors import LoweringError
from quant2e.files import atomic_file
from quant2e.graph.captured.calls import Call, call_of
from quant2e.isolation import quietly, tracing
from quant2e.quantized_io import QuantizedIO, quantized_io_of

_PROTOBUF_LIMIT = 2**31 - 1


@tracing()
def to_onnx(
    model: Lowerable,
    example_inputs: Any = None,
    *,
    path: str | os.PathLike[str],
    dynamic_shapes: Any = None,
    target: str = "onnxruntime",
    verify: bool = True,
    verify_inputs: Iterable[Any] = (),
) -> OnnxProgram:
    """Write a Q/DQ graph as an ONNX file with QuantizeLinear and DequantizeLinear, opset 21.

    ``model``: a QuantizedModel (its example inputs and dynamic shapes are used unless given), a converted or captured
    GraphModule, or an nn.Module in eval mode. ``example_inputs``: a tuple of positional inputs, or a dict of keyword
    inputs. ``path``: of the file, which appears whole or not at all. ``dynamic_shapes``: as for ``torch.export``.
    ``target``: ``"onnxruntime"`` (u8 activations, s8 weights, int32 biases) or ``"tensorrt"`` (s8 with zero points of
    0, float biases; a graph that is not so is refused). ``verify``: run the file in onnxruntime on the example inputs
    and on ``verify_inputs``, compare it with the Q/DQ graph, and list what ran on integers.
    A graph that takes or returns integers becomes a file that does; its metadata has their parameters, named as in a
    ``.pte`` file: ``forward_input0_scale`` and so on.

    Raises `LoweringError`, before a file is written, when onnx, onnxscript or onnxruntime is missing, when the graph
    cannot be exported or held by the target, and when the file does not compute what its graph says.
    """
    if target not in CONVENTIONS:
        raise LoweringError(f"target {target!r}: to_onnx writes for {', '.join(map(repr, CONVENTIONS))}")
    reference = graph_of(model)
    inputs = needed_example_of(model, example_inputs, "to_onnx")
    shapes = dynamic_shapes_of(model, dynamic_shapes)
    with quietly("torch.onnx", "onnxscript", "onnx_ir"):
        _require(verify)
        module = export(reference, inputs, shapes).module(check_guards=False)
        in_form(module, CONVENTIONS[target])
        exported = export(module, inputs, shapes)
        quantized_io = quantized_io_of(reference) if isinstance(reference, GraphModule) else QuantizedIO()
        with atomic_file(Path(path)) as part:
            signature, report = signature_of(exported), _write(exported, part, target, quantized_io)
            if verify:
                in_file = OnnxProgram(part, report, signature)
                report = _verified(in_file, reference, [inputs, *map(call_of, verify_inputs)])
    return OnnxProgram(Path(path), report, signature)


def _write(exported: ExportedProgram, part: Path, target: str, quantized_io: QuantizedIO) -> OnnxReport:
    from onnxscript import ir

    onnx_model = _to_onnx_ir(exported)
    use_integers(onnx_model, unsigned=CONVENTIONS[target].unsigned)
    held = sizes(onnx_model)
    if sum(held.values()) > _PROTOBUF_LIMIT:
        raise LoweringError(f"the constants have {sum(held.values()):,} bytes; an ONNX file holds 2 GiB")
    onnx_model.metadata_props["quant2e.target"] = target
    onnx_model.metadata_props[WORD] = BLANK
    onnx_model.metadata_props.update({name: str(value) for name, value in constants("forward", quantized_io).items()})
    ir.save(onnx_model, part)
    part.write_bytes(sealed(part.read_bytes()))
    return OnnxReport(opset=OPSET, convention=target, size=part.stat().st_size, constants=held)


def _to_onnx_ir(exported: ExportedProgram) -> Any:
    import torch.onnx

    try:
        made = torch.onnx.export(
            exported, dynamo=True, opset_version=OPSET, verbose=False, custom_translation_table=translations()
        )
    except Exception as error:
        raise LoweringError(f"torch.onnx cannot export this graph: {error}") from error
    assert made is not None
    return made.model


def _verified(program: OnnxProgram, reference: Any, batches: list[Call]) -> OnnxReport:
    """The report with what ran on integers and the comparison; raises `LoweringError` beyond the bound."""
    verification = compare_within_noise(program, reference, batches)
    verification.check("the ONNX file")
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
            import onnxruntime  # noqa: F401
    except ImportError as error:
        raise LoweringError(f"ONNX export needs {error.name}: pip install quant2e[onnx]") from error
