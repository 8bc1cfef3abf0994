"""Lowering to ONNX: a Q/DQ graph becomes a file, run in onnxruntime and compared with the graph it came from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from lowering.bounds import calls_at_bounds
from lowering.check import checked
from lowering.choices import Lower
from lowering.export import Lowerable
from lowering.io_parameters import constants
from lowering.onnx.graph import Asker, OnnxGraph, onnx_graph, require_onnx
from lowering.onnx.integer_types import sizes
from lowering.onnx.program import OnnxProgram, OnnxReport, notes_on, onnx_kernels
from lowering.onnx.qdq_form import CONVENTIONS
from lowering.onnx.session import import_onnxruntime
from lowering.onnx.translation import OPSET, OPSETS
from quant2e.checksum import BLANK, WORD, sealed
from quant2e.errors import LoweringError
from quant2e.files import atomic_file
from quant2e.graph.captured.calls import Call, call_of
from quant2e.isolation import quietly, tracing
from quant2e.stages import quiet_where_false, stage

OTHERWISE = "Lower the model with to_inductor or to_executorch instead"
"""What to do with a wrong file, where no op is to blame that could be left in float."""

_ASKER = Asker(call="to_onnx", file="an ONNX file", runtime="onnxruntime")


@quiet_where_false
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
    with quietly("torch.onnx", "onnxscript", "onnx_ir"):
        made = onnx_graph(
            model,
            example_inputs,
            dynamic_shapes,
            convention=CONVENTIONS[target],
            asker=_ASKER,
            require=partial(_require, verify),
            opset=opset,
            computes=target == "onnxruntime",
        )
        signature, reference, example = made.signature, made.reference, made.example
        with atomic_file(Path(path)) as part:
            report = _write(made, part, target, opset)
            if verify:
                in_file = OnnxProgram(part, report, signature)
                with tempfile.TemporaryDirectory() as folder:
                    options: dict[str, Any] = {"dynamic_shapes": made.shapes, "target": target, "opset": opset}
                    lower = partial(_lower_part, example=example, options=options, folder=Path(folder))
                    batches = [example, *calls_at_bounds(signature, example, reference), *map(call_of, verify_inputs)]
                    report = _verified(in_file, reference, batches, lower, made.graph)
    return OnnxProgram(Path(path), report, signature)


def _write(made: OnnxGraph, part: Path, target: str, opset: int) -> OnnxReport:
    from onnxscript import ir

    onnx_model, quantized_io = made.model, made.quantized_io
    held = sizes(onnx_model)
    onnx_model.metadata_props["quant2e.target"] = target
    onnx_model.metadata_props[WORD] = BLANK
    onnx_model.metadata_props.update({name: str(value) for name, value in constants("forward", quantized_io).items()})
    ir.save(onnx_model, part)
    part.write_bytes(sealed(part.read_bytes()))
    return OnnxReport(opset=opset, convention=target, size=part.stat().st_size, constants=held)


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
    kernels, floats = onnx_kernels(program.path)
    return replace(
        program.report,
        verification=verification,
        integer_kernels=kernels,
        float_products=floats,
        notes=notes_on(kernels),
    )


def _require(verify: bool) -> None:
    """Import what is needed; raise `LoweringError` when it is not installed."""
    require_onnx("ONNX export", "onnx")
    try:
        if verify:
            import_onnxruntime()
    except ImportError as error:
        raise LoweringError(f"ONNX export needs {error.name}: pip install quant2e[onnx]") from error
