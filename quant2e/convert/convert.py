"""Conversion: observed graph → Q/DQ graph.

Every observer is asked for its encoding before the first node is written, so a failure changes nothing and names every
tensor that is wrong, not only the first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.convert.insert_qdq import quantize_at, round_at
from quant2e.convert.legality import check_legality
from quant2e.convert.moved_biases import moved_biases
from quant2e.errors import CalibrationError, Quant2eError, where
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.fake_values import FakeValueCache
from quant2e.graph.mutation import own_tensors, own_written_tensors
from quant2e.observers.base import OBSERVER_PREFIX
from quant2e.observers.encodings import (
    Encoding,
    PerChannelEncoding,
    PerGroupEncoding,
    PerTensorEncoding,
    RoundedConstant,
    encode,
)
from quant2e.observers.measuring import searchable
from quant2e.passes import run
from quant2e.passes.dead_code import prune_unused_attributes, remove_dead_code
from quant2e.passes.fold_weights import attribute_path, fold_weights
from quant2e.passes.split_dequantize import split_dequantize
from quant2e.passes.train_batch_norm import FUSED
from quant2e.prepare.masks import left_float
from quant2e.prepare.qat import end_training
from quant2e.ranges.search import searched_together
from quant2e.report.record import RECORD_KEY, GraphRecord
from quant2e.report.report import tensor_bytes


def convert_pt2e(
    prepared: GraphModule, use_reference_representation: bool = False, fold_quantize: bool = True
) -> GraphModule:
    """Replace every observer by the quantize/dequantize pair its statistics ask for.

    ``use_reference_representation``: the graph computes in integers, as `quant2e.to_integer` writes it, in place of
    float ops between dequantize and quantize.
    ``fold_quantize``: keep weights as integers; False leaves them float, in front of their quantize op.
    A model trained after `prepare_qat_pt2e` has its batch norms folded here, into the weights it was trained with; it
    shares no tensor with the result. ``prepared`` is not changed and can be converted again. Raises `CaptureError` for
    a trained model with other ops in training mode, and `CalibrationError` that names every op whose tensor
    saw no data or has no usable range.
    """
    if not isinstance(prepared, GraphModule):
        raise Quant2eError(f"convert_pt2e takes what prepare_pt2e returned, not a {type(prepared).__name__}")
    gm = copy_graph(prepared, compiled=False)
    trained = FUSED in gm.meta
    notes = end_training(gm) if trained else []
    calls = [n for n in gm.graph.nodes if n.op == "call_module" and str(n.target).startswith(OBSERVER_PREFIX)]
    record = prepared.meta.get(RECORD_KEY)
    if not calls and not isinstance(record, GraphRecord):
        raise Quant2eError("this model has no observers: call prepare_pt2e on it, calibrate, and then convert")
    own_written_tensors(gm)
    floats = left_float(prepared)
    with searched_together(searchable(prepared.modules())):
        encodings = _encode_all(gm, calls, floats.observers)
    constants = Constants(gm.graph)
    notes += [*_notes(gm, calls, encodings), *map(str, moved_biases(gm, calls, encodings, constants))]
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
        quantize_at(gm, call, encoding, prefix, fake_values)
    for name in encodings:
        gm.delete_submodule(name)
    fold = (fold_weights,) if fold_quantize else ()
    run(gm, (split_dequantize, *fold, remove_dead_code, prune_unused_attributes), compiled=False)
    if trained:
        own_tensors(gm, trainable=False)  # training may go on, in tensors that are the prepared model's
    gm.recompile()
    for module in gm.modules():
        module.training = False  # as the graph is, whatever rebuilt it set
    gm.converted = True
    check_legality(gm)
    if isinstance(record, GraphRecord):
        report = record.report.with_float(floats.readers).with_notes(
            (*dict.fromkeys(floats.observers.values()), *notes)
        )
        report = replace(report, quantized_bytes=tensor_bytes(gm))
        found = tuple(encodings.get(name) for name in record.observers)
        gm.meta[RECORD_KEY] = replace(record, report=report, encodings=found)
    if use_reference_representation:
        from quant2e.integer import to_integer

        return to_integer(gm)
    return gm


def _encode_all(gm: GraphModule, calls: list[Node], floats: Collection[str]) -> dict[str, Encoding | None]:
    encodings: dict[str, Encoding | None] = dict.fromkeys(floats)
    failures: list[str] = []
    for call in calls:
        name = str(call.target)
        if name in encodings:
            continue
        encodings[name] = None
        try:
            encodings[name] = encode(gm.get_submodule(name))
        except CalibrationError as error:
            failures.append(f"  {_place(call)}: {error}")
    if failures:
        raise CalibrationError(
            f"{len(failures)} tensor{'s' if len(failures) > 1 else ''} cannot be quantized:\n" + "\n".join(failures)
        )
    return encodings


def _place(call: Node) -> str:
    """The observed tensor, and the ops on both sides of it."""
    source = call.all_input_nodes[0]
    while source.op == "call_module" and source.all_input_nodes:
        source = source.all_input_nodes[0]
    users = [user for user in call.users if user.op == "call_function"]
    if source.op == "call_function" or not users:
        return f"the output of {where(source)}"
    return f"'{source.name}', read by {where(users[0])}"


def _notes(gm: GraphModule, calls: list[Node], encodings: Mapping[str, Encoding | None]) -> list[str]:
    """What a reader should know: choices that observers made, tensors that round to zero, values left out of a
    range.
    """
    notes = []
    first: dict[str, Node] = {}
    for call in calls:
        first.setdefault(str(call.target), call)
    for name, call in first.items():
        observer: Any = gm.get_submodule(name)
        observer = getattr(observer, "activation_post_process", observer)
        encoding = encodings[name]
        if encoding is None:
            continue
        if callable(remark := getattr(observer, "remark", None)) and (said := remark()):
            notes.append(said)
        if isinstance(encoding, (PerTensorEncoding, PerChannelEncoding, PerGroupEncoding)) and _flushes_to_zero(
            observer, encoding
        ):
            notes.append(f"{_place(call)}: every value rounds to 0 at the smallest scale its spec allows")
        masked = getattr(observer, "masked_count", None)
        if isinstance(masked, torch.Tensor):
            masked = int(masked)
        if isinstance(masked, int) and masked > 0:
            notes.append(f"{_place(call)}: {masked} masked values (-inf or a mask's sentinel) left out of the range")
    return notes


def _flushes_to_zero(observer: Any, encoding: PerTensorEncoding | PerChannelEncoding | PerGroupEncoding) -> bool:
    """Whether a tensor that is not all zero rounds to zero everywhere: its largest value is below half a step."""
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    if not isinstance(low, torch.Tensor) or not isinstance(high, torch.Tensor) or low.numel() == 0:
        return False
    peak = torch.maximum(low.abs(), high.abs()).flatten()
    return bool((peak > 0).any()) and bool((peak < torch.as_tensor(encoding.scale).flatten() / 2).all())
