"""Lowering to OpenVINO: a Q/DQ graph becomes a model, run in OpenVINO and compared with the graph it came from.

By way of ONNX: OpenVINO's frontend for it makes a FakeQuantize of each pair of QuantizeLinear and DequantizeLinear, and
keeps weights as integers, which its passes for low precision make kernels on u8 and s8 of. Its frontend for exported
programs of torch (2026.4) reads none of our graphs: it knows float weights behind quantize ops only.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from lowering.bounds import calls_at_bounds
from lowering.check import checked
from lowering.choices import Lower
from lowering.export import Lowerable
from lowering.io_parameters import constants
from lowering.onnx.graph import Asker, OnnxGraph, model_bytes, onnx_graph, require_onnx
from lowering.onnx.integer_types import sizes
from lowering.onnx.qdq_form import OPENVINO
from lowering.openvino.files import seal_of
from lowering.openvino.precision import run_ops
from lowering.openvino.program import PRECISION, SATURATES, OpenVINOProgram, OpenVINOReport
from lowering.openvino.session import RUN_TIME_OPTIONS, import_openvino, read_model
from lowering.openvino.sums import sums_inside
from lowering.signature import Signature
from quant2e import __version__
from quant2e.checksum import BLANK, sealed
from quant2e.errors import FileFormatError, LoweringError
from quant2e.graph.captured.calls import Call, call_of
from quant2e.isolation import quietly, tracing
from quant2e.stages import quiet_where_false, stage
from quant2e.versions import TORCH_VERSION

OTHERWISE = "Lower the model with to_inductor or to_executorch instead"
"""What to do with a wrong program, where no op is to blame that could be left in float."""

_OWN = re.compile(r"[A-Z][A-Za-z]*_\d+")
"""How OpenVINO names ops itself."""

_ASKER = Asker(call="to_openvino", file="an OpenVINO model of ours", runtime="OpenVINO")


@quiet_where_false
@stage("lower to OpenVINO")
@tracing()
def to_openvino(
    model: Lowerable,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    verify: bool = True,
    verify_inputs: Iterable[Any] = (),
    progress: bool | None = None,  # noqa: ARG001  # read by the decorator
) -> OpenVINOProgram:
    """Lower a Q/DQ graph to an OpenVINO model, whose kernels compute on integers where the graph does.

    ``model``: a QuantizedModel (its example inputs and dynamic shapes are used unless given), a converted or captured
    GraphModule, or an nn.Module in eval mode. ``example_inputs``: a tuple of positional inputs, or a dict of keyword
    inputs. ``dynamic_shapes``: as for ``torch.export``; their bounds are in the model. ``verify``: run the model in
    OpenVINO on the example inputs, also with the smallest and largest sizes that vary, and on ``verify_inputs``,
    compare it with the Q/DQ graph, and list what ran on integers, and what did not with the reason.
    A graph that takes or returns integers becomes a model that does; the ``.xml`` has their parameters, named as in a
    ``.pte`` file: ``forward_input0_scale`` and so on. ``progress``: False shows no stages on a terminal (see
    `quant2e.stages`).

    Raises `LoweringError` when openvino, onnx or onnxscript is missing, when the graph cannot be exported or held by
    the target, and when the model does not compute what its graph says.
    """
    with quietly("torch.onnx", "onnxscript", "onnx_ir"):
        made = onnx_graph(model, example_inputs, dynamic_shapes, convention=OPENVINO, asker=_ASKER, require=_require)
        program = _program(made)
        if not verify:
            return program
        lower = partial(_lower_part, example=made.example, shapes=made.shapes)
        calls = calls_at_bounds(made.signature, made.example, made.reference)
        batches = [made.example, *calls, *map(call_of, verify_inputs)]
        return _verified(program, made.reference, batches, lower, made.graph)


def _require() -> None:
    import_openvino()
    require_onnx("OpenVINO lowering", "openvino")


def _program(made: OnnxGraph) -> OpenVINOProgram:
    openvino = import_openvino()
    try:
        read = read_model(model_bytes(made.model), b"", "the graph")
        _bound(read, made.signature)
        sums_inside(read)
    except (FileFormatError, RuntimeError) as error:
        raise LoweringError(f"OpenVINO cannot read this graph: {error}") from error
    _name_plainly(read)
    for name, value in RUN_TIME_OPTIONS.items():
        read.set_rt_info(value, ["runtime_options", name])
    versions = {"quant2e": __version__, "torch": TORCH_VERSION, "openvino": openvino.__version__}
    read.set_rt_info(json.dumps(versions), ["quant2e", "versions"])
    for name, parameter in constants("forward", made.quantized_io).items():
        read.set_rt_info(str(parameter), ["quant2e", name])
    xml, weights = _serialized(read)
    report = OpenVINOReport(
        version=openvino.__version__.split("-")[0], size=len(xml) + len(weights), constants=sizes(made.model)
    )
    return OpenVINOProgram(xml, weights, report, made.signature)


def _bound(model: Any, signature: Signature) -> None:
    """Give each size that varies its bounds."""
    openvino = import_openvino()
    shapes = {spec.name: spec.value.shape for spec in signature.inputs if isinstance(spec.value, torch.Tensor)}
    if len(shapes) == len(model.inputs):
        shapes = dict(zip((one.get_any_name() for one in model.inputs), shapes.values(), strict=True))
    given = {}
    for one in model.inputs:
        sizes_of = [_bounds(size, signature) for size in shapes[one.get_any_name()]]
        given[one] = openvino.PartialShape([openvino.Dimension(*size) for size in sizes_of])
    if any(shape.is_dynamic for shape in given.values()):
        model.reshape(given)


def _bounds(size: Any, signature: Signature) -> tuple[int, ...]:
    """One number, or the least and the largest, which is -1 where there is none."""
    if not isinstance(size, torch.SymInt):
        return (int(size),)
    low, high = signature.symbols.get(size.node.expr, (0.0, float("inf")))
    return max(int(low), 0), -1 if high == float("inf") else int(high)


def _name_plainly(model: Any) -> None:
    """Names that count from 0 for ops that OpenVINO named itself: it counts through the whole process.

    The same graph is then the same bytes.
    """
    taken = {op.get_friendly_name() for op in model.get_ordered_ops()}
    for place, op in enumerate(model.get_ordered_ops()):
        about = op.get_rt_info()
        for key in [key for key, _ in about.items() if key.startswith("fused_names")]:
            del about[key]
        known, kind = op.get_friendly_name(), op.get_type_name()
        own = known == op.get_name() or (kind == "Constant" and _OWN.fullmatch(known))  # folded, under the old name
        if own and kind not in {"Parameter", "Result"}:
            name = f"{kind}:{place}"
            assert name not in taken, "names with a colon are ours"
            op.set_friendly_name(name)


def _serialized(model: Any) -> tuple[bytes, bytes]:
    """The bytes of the two files, with their checksums."""
    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as folder:
        xml, weights = Path(folder) / "model.xml", Path(folder) / "model.bin"
        openvino.serialize(model, str(xml), str(weights))
        content = weights.read_bytes()
        model.set_rt_info(seal_of(content), ["quant2e", "beside"])
        model.set_rt_info(BLANK, ["quant2e", "sha256"])
        openvino.serialize(model, str(xml), str(weights))
        return sealed(xml.read_bytes()), content


def _lower_part(part: GraphModule, *, example: Call, shapes: Any) -> OpenVINOProgram:
    return to_openvino(part, example, dynamic_shapes=shapes, verify=False)


def _verified(
    program: OpenVINOProgram, reference: Any, batches: list[Call], lower: Lower, graph: GraphModule
) -> OpenVINOProgram:
    """The program with what ran on integers and the comparison; raises `LoweringError` beyond the bound."""
    found = checked("the OpenVINO model", program, reference, batches, lower, graph=graph, otherwise=OTHERWISE)
    ops = run_ops(read_model(program.xml, program.weights, "this model"), program.compiled)
    notes = (SATURATES, PRECISION) if any(op.on_integers for op in ops) else (PRECISION,)
    return program.with_report(replace(program.report, ops=ops, notes=notes, verification=found))
