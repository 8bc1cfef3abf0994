"""Conversion to the integer representation: Q/DQ graph in, integer graph out."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import get_args

from torch.fx import GraphModule, Node

from quant2e.errors import Quant2eError
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.constants import Constants
from quant2e.graph.control_flow import graphs_of, has_bodies
from quant2e.graph.dataflow import readers
from quant2e.graph.fake_values import is_float
from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE, serves_parameters
from quant2e.integer.arithmetic.builder import Builder, Record
from quant2e.integer.arithmetic.grid import QUANTIZE_STATIC
from quant2e.integer.arithmetic.requantization import Requantization
from quant2e.integer.arithmetic.values import IntegerContext
from quant2e.integer.functionalize import exposed, use_functional_ops
from quant2e.integer.report import INTEGER, IntegerReport, IntegerVerdict, with_integers_of
from quant2e.integer.rewrite import rewrite
from quant2e.passes import Promise, run
from quant2e.passes.dead_code import prune_unused_attributes, remove_dead_code
from quant2e.passes.fold_weights import fold_weights
from quant2e.passes.in_bodies import rewrite_bodies
from quant2e.report.record import RECORD_KEY, GraphRecord
from quant2e.report.report import tensor_bytes


def to_integer(
    converted: GraphModule, *, requantization: Requantization = "float32", strict: bool = False
) -> GraphModule:
    """The integer form of a Q/DQ graph, in ATen ops only; ``converted`` is not changed.

    ``requantization``: from accumulators to outputs. ``"float32"``: multiply in float, round half to even (XNNPACK);
    ``"fixed_point"``: int32 multiplier and shift, rounding twice (gemmlowp, TFLite); ``"fixed_point_single_rounding"``:
    the same, rounding once (TOSA); ``"power_of_two"``: shifts, for scales that are powers of two apart.

    What has no integer form stays between dequantize and quantize and is listed in the report (`integer_report`).
    ``strict``: raise `Quant2eError` that lists such ops instead, where the quantizer had asked for them.
    """
    if not isinstance(converted, GraphModule):
        raise Quant2eError(f"to_integer takes what convert_pt2e returned, not a {type(converted).__name__}")
    if requantization not in get_args(Requantization):
        raise Quant2eError(f"requantization={requantization!r}: choose one of {', '.join(get_args(Requantization))}")
    if INTEGER in converted.meta:
        raise Quant2eError("this graph computes in integers already")
    gm = copy_graph(converted, compiled=False)
    if not any(_is_quantized(graph) for _, graph in graphs_of(gm)):
        raise Quant2eError("this graph has no quantize or dequantize ops: convert a prepared model first")
    report = _compute_in_integers(gm, requantization)
    if strict and report.left:
        lines = "\n".join(f"  '{v.name}' ({v.op}): {v.reason}" for v in report.left)
        raise Quant2eError(f"{len(report.left)} quantized ops have no integer form ({requantization}):\n{lines}")
    _file(gm, report)
    return gm


def _is_quantized(gm: GraphModule) -> bool:
    return any(n.target in QUANTIZE | DEQUANTIZE for n in gm.graph.nodes if n.op == "call_function")


def _compute_in_integers(gm: GraphModule, requantization: Requantization) -> IntegerReport:
    """Rewrite ``gm`` and the bodies in it, in place."""
    bodies: dict[str, IntegerReport] = {}

    def rewrite_body(path: str, body: GraphModule) -> None:
        bodies[path] = _compute_in_integers(body, requantization)

    rewrite_bodies(gm, rewrite_body)
    run(gm, (fold_weights, use_functional_ops), compiled=False)
    float_ops = [node.name for node in gm.graph.nodes if _computes_float(node)]
    targets = {node.name: str(node.target) for node in gm.graph.nodes}
    asked = _asked(gm)
    ctx = IntegerContext(gm, Builder(gm, requantization), Constants(gm.graph), exposed=exposed(gm))
    constants = {node.name for node in ctx.constants}

    def integer_form(_: GraphModule) -> int:
        return rewrite(ctx)

    clean = (remove_dead_code, prune_unused_attributes)
    run(gm, (integer_form, *clean), compiled=False, promise=Promise(result=False))
    gm.recompile()
    verdicts = tuple(
        IntegerVerdict(
            name, targets[name], name in ctx.integer and name not in ctx.failed, _reason(ctx, name), name in asked
        )
        for name in float_ops
        if name not in constants
    )
    report = IntegerReport(requantization, verdicts, tuple(dict.fromkeys(ctx.b.notes)), _alive(gm, ctx.b))
    for path, body in bodies.items():
        report = with_integers_of(report, path, body)
    return report


def _computes_float(node: Node) -> bool:
    if node.op != "call_function" or node.target in QUANTIZE | DEQUANTIZE | CHOOSE_QPARAMS or serves_parameters(node):
        return False
    return is_float(node) and node.target is not operator.getitem and not has_bodies(node)


def _asked(gm: GraphModule) -> set[str]:
    """Ops that the quantizer annotated and whose result it wants in integers.

    Those with a quantize op behind them, or behind ops it annotated. An activation fused to a dynamic product gives
    floats, for which a scale is found next: not asked. Without a record of annotations: those between a dequantize and
    a quantize op.
    """
    record = gm.meta.get(RECORD_KEY)
    if isinstance(record, GraphRecord) and record.report.verdicts:
        annotated = {v.op.name for v in record.report.verdicts if v.quantized}
        wanted: set[str] = set()
        for node in reversed(gm.graph.nodes):
            found = list(readers(node, _is_part))
            ends = QUANTIZE if any(n.target in DEQUANTIZE for n in node.all_input_nodes) else {QUANTIZE_STATIC}
            if node.name in annotated and any(u.target in ends or u.name in wanted for u in found):
                wanted.add(node.name)
        return wanted
    return {
        node.name
        for node in gm.graph.nodes
        if any(n.target in DEQUANTIZE for n in node.all_input_nodes)
        and any(u.target in QUANTIZE for u in readers(node, _is_part))
    }


def _is_part(node: Node) -> bool:
    """Is it one of several results?"""
    return node.target is operator.getitem


def _reason(ctx: IntegerContext, name: str) -> str:
    return ctx.failed.get(name) or ctx.integer.get(name) or ctx.left.get(name) or "nothing reads it in integers"


def _alive(gm: GraphModule, b: Builder) -> tuple[Record, ...]:
    names = {node.name for node in gm.graph.nodes}
    return tuple(r for r in b.records if {r.output, *r.inputs.values()} <= names)


def _file(gm: GraphModule, report: IntegerReport) -> None:
    """Put the report into ``gm.meta``, and what stays float into the notes of the general report."""
    gm.meta[INTEGER] = report
    record = gm.meta.get(RECORD_KEY)
    if isinstance(record, GraphRecord):
        integer = sum(v.integer for v in report.verdicts)
        head = f"integer representation ({report.requantization}): {integer} ops compute in integers"
        left = [f"'{v.name}' stays between dequantize and quantize: {v.reason}" for v in report.left]
        general = replace(record.report.with_notes([head, *left, *report.notes]), quantized_bytes=tensor_bytes(gm))
        gm.meta[RECORD_KEY] = replace(record, report=general)
