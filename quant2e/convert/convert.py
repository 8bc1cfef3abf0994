"""Conversion: observed graph → Q/DQ graph.

Every observer is asked for its encoding before the first node is written, so a failure changes nothing and names every
tensor that is wrong, not only the first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from quant2e.calibration.batches import FEW_SAMPLES
from quant2e.calibration.statistics import SAMPLES, undecided
from quant2e.convert.bodies import convert_bodies, never_ran
from quant2e.convert.encode_all import encode_all, losses_of, notes_of
from quant2e.convert.given_encodings import with_encodings
from quant2e.convert.insert_qdq import quantize_at, round_at
from quant2e.convert.legality import check_legality
from quant2e.convert.moved_biases import moved_biases
from quant2e.convert.worst_tensors import worst_tensors
from quant2e.errors import Quant2eError, QuantizationWarning
from quant2e.graph.attributes import replace_tensor, tensor_at
from quant2e.graph.captured.inputs import Inputs, input_path
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.edit import emit_constant
from quant2e.graph.fake_values import FakeValueCache
from quant2e.graph.mutation import own_tensors, own_written_tensors
from quant2e.observers.base import inner_observer, is_observer_call
from quant2e.observers.encodings import Encoding, RoundedConstant
from quant2e.observers.given import constant_of, integers_given
from quant2e.observers.measuring import searchable
from quant2e.passes import run
from quant2e.passes.dead_code import prune_unused_attributes, remove_dead_code
from quant2e.passes.fold_weights import attribute_path, fold_weights
from quant2e.passes.integer_buffers import integer_buffers
from quant2e.passes.split_dequantize import split_dequantize
from quant2e.passes.train_batch_norm import FUSED
from quant2e.prepare.masks import left_float
from quant2e.prepare.qat import end_training
from quant2e.ranges.search import searched_together
from quant2e.report.encodings import Encodings
from quant2e.report.record import RECORD_KEY, GraphRecord
from quant2e.report.report import FLOAT, tensor_bytes, with_body
from quant2e.report.weight_reads import weight_reads
from quant2e.stages import stage
from quant2e.stored_tensor import read_stored, stored_in
from quant2e.weights.freed_memory import hand_back_memory
from quant2e.weights.short_form import Shortened


def convert_pt2e(
    prepared: GraphModule,
    use_reference_representation: bool = False,
    fold_quantize: bool = True,
    *,
    encodings: Encodings | None = None,
) -> GraphModule:
    """Replace every observer by the quantize/dequantize pair its statistics ask for.

    ``use_reference_representation``: the graph computes in integers, as `quant2e.to_integer` writes it, in place of
    float ops between dequantize and quantize.
    ``fold_quantize``: keep weights as integers; False leaves them float, in front of their quantize op.
    ``encodings``: what points become, bit for bit, whatever was calibrated (`QuantizedModel.encodings`, a file edited
    by hand); points that they do not name are as calibration found them. See `quant2e.convert.given_encodings`.
    A model trained after `prepare_qat_pt2e` has its batch norms folded here, into the weights it was trained with; it
    shares no tensor with the result. ``prepared`` is not changed and can be converted again.

    Warns once (`QuantizationWarning`) when ops stayed float or tensors lost values; `report_of` has all of it. Raises
    `CaptureError` for a trained model with other ops in training mode, `CalibrationError` that names the first ops
    whose tensor saw no data, has no usable range, or would become all zero, and `AnnotationError` for encodings of
    points or tensors that are not there.
    """
    if encodings is not None:
        prepared = with_encodings(prepared, encodings)
    gm = converted_graph(prepared, use_reference_representation, fold_quantize)
    if told := _in_short(gm):
        warnings.warn(told, QuantizationWarning, stacklevel=2)
    return gm


def _in_short(gm: GraphModule) -> str:
    """What did not happen, as counts; empty when everything did."""
    record = gm.meta.get(RECORD_KEY)
    if not isinstance(record, GraphRecord):
        return ""
    report = record.report
    left = sum(verdict.kind == FLOAT for verdict in report.verdicts)
    if not left and not report.losses:
        return ""
    count = report.quantized_ops
    text = f"convert_pt2e: {count or 'none'} of {count + left} float ops quantized, {left} left float"
    if report.losses:
        text += f", {len(report.losses)} tensor{'s' if len(report.losses) > 1 else ''} losing values"
    if not count and left:
        text += " (does the quantizer have a configuration? set_global, say)"
    return f"{text}; print(quant2e.report_of(converted)) says which, and why"


def _few_samples(prepared: GraphModule) -> list[str]:
    samples = prepared.meta.get(SAMPLES)
    if samples is None or samples >= FEW_SAMPLES or all(observer.frozen for observer in undecided(prepared).values()):
        return []
    count = f"{samples} sample{'s' if samples != 1 else ''}"
    told = f"calibrated on only {count}: ranges, and an accuracy measured on as few, may be far from the truth"
    return [f"{told}; about 100 samples are usually enough"]


def _same_throughout(gm: GraphModule, calls: list[Node]) -> list[str]:
    """A note for each input of which calibration saw one value only: images that were not read, a mask left out."""
    told: list[str] = []
    if not isinstance(getattr(gm, "inputs", None), Inputs):  # the body of a loop or a branch
        return told
    for call in calls:
        source, observer = call.all_input_nodes[0], gm.get_submodule(str(call.target))
        low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
        if source.op != "placeholder" or not isinstance(low, Tensor) or not isinstance(high, Tensor):
            continue
        if low.numel() == 1 and bool(low == high):
            told.append(
                f"the input '{input_path(source)}' was {float(low):g} throughout the calibration data: its range says "
                "nothing of other values"
            )
    return told


@stage("convert")
def converted_graph(
    prepared: GraphModule,
    use_reference_representation: bool = False,
    fold_quantize: bool = True,
    *,
    last: bool = False,
) -> GraphModule:
    """As `convert_pt2e`, without its warning: for callers that hand on the report.

    ``last``: ``prepared`` is not converted again, so what was observed of its constants is dropped.
    """
    if not isinstance(prepared, GraphModule):
        raise Quant2eError(f"convert_pt2e takes what prepare_pt2e returned, not a {type(prepared).__name__}")
    gm = copy_graph(prepared, compiled=False)
    inside = convert_bodies(gm, lambda body: converted_graph(body, fold_quantize=fold_quantize))
    trained = FUSED in gm.meta
    notes = end_training(gm) if trained else []
    calls = [node for node in gm.graph.nodes if is_observer_call(node)]
    record = prepared.meta.get(RECORD_KEY)
    if not calls and not isinstance(record, GraphRecord):
        raise Quant2eError("this model has no observers: call prepare_pt2e on it, calibrate, and then convert")
    own_written_tensors(gm)
    floats = never_ran(prepared) or left_float(prepared)
    with searched_together(searchable(prepared.modules())):
        encodings = encode_all(gm, calls, floats.observers, short=stored_in(gm))
    constants = Constants(gm.graph)
    moved = map(str, moved_biases(gm, calls, encodings, constants))
    losses = (*losses_of(gm, calls, encodings, constants), *moved)
    worst = worst_tensors(gm, calls, encodings)
    notes += [*notes_of(gm, calls, encodings), *_few_samples(prepared), *_same_throughout(gm, calls)]
    if last:
        _forget((gm, prepared), [call for call in calls if call.all_input_nodes[0] in constants])
    _write(gm, calls, encodings, constants)
    for name in encodings:
        gm.delete_submodule(name)
    notes += integer_buffers(gm)
    fold = (fold_weights,) if fold_quantize else ()
    run(gm, (split_dequantize, *fold, remove_dead_code, prune_unused_attributes), compiled=False)
    if trained:
        own_tensors(gm, trainable=False)  # training may go on, in tensors that are the prepared model's
    read_stored(gm, besides=(Shortened,))  # what stays float
    gm.recompile()
    for module in gm.modules():
        module.training = False  # as the graph is, whatever rebuilt it set
    gm.converted = True
    check_legality(gm)
    if isinstance(record, GraphRecord):
        report = record.report.with_float(floats.readers).with_notes(
            (*dict.fromkeys(floats.observers.values()), *notes)
        )
        size, reads = tensor_bytes(gm), weight_reads(gm)
        report = replace(report, losses=losses, tensors=worst, quantized_bytes=size, weight_reads=reads)
        for path, body in inside.items():
            report = with_body(report, path, body.report)
        found = tuple(encodings.get(name) for name in record.observers)
        gm.meta[RECORD_KEY] = replace(record, report=report, encodings=found, bodies=inside)
    if use_reference_representation:
        from quant2e.integer import to_integer

        return to_integer(gm)
    return gm


def _forget(graphs: Iterable[GraphModule], calls: Iterable[Node]) -> None:
    """Drop the ranges that the observers of ``calls`` found, in all ``graphs``: two numbers for each group of a weight.

    The observers of a copy are its own.
    """
    names = {str(call.target) for call in calls}
    for observer in (inner_observer(gm.get_submodule(name)) for gm in graphs for name in names):
        for name in getattr(observer, "statistics", ()):
            if name != "counts":
                setattr(observer, name, torch.empty(0))
    hand_back_memory()


def _write(gm: GraphModule, calls: list[Node], encodings: Mapping[str, Encoding | None], constants: Constants) -> None:
    """Put what its encoding asks for in the place of every observer call."""
    fake_values = FakeValueCache()
    for call in calls:
        encoding = encodings[str(call.target)]
        if encoding is None or (isinstance(encoding, RoundedConstant) and call.all_input_nodes[0] not in constants):
            call.replace_all_uses_with(call.all_input_nodes[0])
            gm.graph.erase_node(call)
            continue
        source = call.all_input_nodes[0]
        prefix = attribute_path(source) if source in constants else source.name
        if isinstance(encoding, RoundedConstant):
            round_at(gm, call, evaluate(gm, source), encoding, prefix)
            continue
        if integers_given(gm, call) is not None:
            _put_on_grid(gm, call, prefix)
        quantize_at(gm, call, encoding, prefix, fake_values)


def _put_on_grid(gm: GraphModule, call: Node, prefix: str) -> None:
    """Let ``call`` read the constant with its given integers: under its own name where nothing else reads that."""
    source, value = call.all_input_nodes[0], constant_of(gm, call)
    old = tensor_at(gm, source)
    alone = (
        list(source.users) == [call] and sum(n.target == source.target for n in gm.graph.find_nodes(op="get_attr")) == 1
    )
    if old is not None and old.dtype == value.dtype and alone:
        replace_tensor(gm, str(source.target), nn.Parameter(value, requires_grad=False))
    else:
        call.args = (emit_constant(gm, call, f"{prefix}_on_grid", value),)
