"""The pipeline in one call: a model in, a quantized model with its report out."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.driver import Attempt, Driver, Mended
from quant2e.accuracy.algorithms.ladder import ENOUGH_DB, attempts_of
from quant2e.accuracy.algorithms.registry import Algorithms
from quant2e.accuracy.compare import compare
from quant2e.accuracy.output_error import outputs_of
from quant2e.accuracy.output_loss import converted_sqnr, in_floats
from quant2e.accuracy.recipe.recipe import Recipe, recipe_of
from quant2e.accuracy.tuning.space.evaluation import Evaluate
from quant2e.accuracy.tuning.tune import tune
from quant2e.annotation.quantizer import Quantizer
from quant2e.calibration.batches import check_iterable
from quant2e.calibration.calibrate import Progress
from quant2e.calibration.feed import Feed, Transform
from quant2e.calibration.held_out import HeldOutData, calibrate_but_some
from quant2e.calibration.range_selection import ranges_of
from quant2e.calibration.repeated_data import RepeatedData
from quant2e.convert.convert import converted_graph
from quant2e.convert.given_encodings import with_encodings
from quant2e.errors import AccuracyError, AnnotationError, CalibrationError, Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import capture_call
from quant2e.graph.captured.module import independent_copy
from quant2e.prepare.prepare import prepare_pt2e
from quant2e.quantized_io import quantized_io_of, with_quantized_io
from quant2e.quantized_model import QuantizedModel
from quant2e.report.algorithm_step import kept_algorithms
from quant2e.report.encodings import Encodings, encodings_of
from quant2e.report.record import RECORD_KEY, record_of
from quant2e.report.report import BAD_SQNR_DB, Report
from quant2e.stages import heard, quiet_where_told
from quant2e.stored_tensor import read_stored, stored_in
from quant2e.weights.freed_memory import hand_back_memory

LEAST_SQNR_DB = 10.0
"""Below, a tenth of the output's power is noise."""


@quiet_where_told
def quantize(
    model: nn.Module | ExportedProgram | GraphModule,
    example_inputs: Any,
    quantizer: Quantizer,
    calibration_data: Iterable[Any] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    dynamic_batch: bool | int = False,
    transform: Transform | None = None,
    use_reference_representation: bool = False,
    int8_io: bool = False,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    algorithms: Algorithms = (),
    encodings: Encodings | None = None,
    allow_unquantized: bool = False,
    min_sqnr_db: float | None = LEAST_SQNR_DB,
    evaluate: Evaluate | None = None,
    max_drop: float | None = None,
    progress: Progress | bool | None = None,
) -> QuantizedModel:
    """Capture, prepare, calibrate, convert; then measure against float.

    ``example_inputs``: positional inputs (a tuple; a single tensor is taken as one) or a dict of keyword inputs,
    ``kwargs``: keyword inputs. ``dynamic_shapes``: sizes that vary, as for ``torch.export.export``; ``dynamic_batch``:
    the first size of every input does, to any (True) or to that many samples at most. ``calibration_data``: any
    iterable of what the model takes (tensors, tuples, dicts; the DataLoader of a training script works, see
    `quant2e.calibrate`), each item through ``transform`` first; dynamic and weight-only quantizers need none. A few of
    its batches are held out, never calibrated on: candidate ranges are compared on them (see `select_ranges`), and they
    measure the SQNR in the report.
    ``use_reference_representation``: the module computes in integers, see `quant2e.to_integer`. ``int8_io``: it takes
    and returns integers wherever it quantizes its inputs and outputs, with the parameters in ``.quantized_io``; see
    `quant2e.with_quantized_io`.
    ``recipe``: what is asked of ``quantizer``, and which algorithms: a `Recipe`, a file, or a name ("w8a8-dynamic").
    ``algorithms``: what is to mend accuracy, in their order: names, ``{name: settings}`` or `Algorithm` objects, or
    "auto", which tries what may help this model and quantizer until the output keeps 30 dB. Each works on a copy and is
    kept only where the held-out error does not grow; ``report.algorithms`` has a line for each. They learn from the
    first 64 batches, those held out excepted, and the data is read more than once: up to 256 batches are kept in
    memory, and more must be an iterable that gives the same batches each time, not a generator.
    ``encodings``: what points become, bit for bit: those of an earlier result, or of a file edited by hand; where they
    name all points, no data is needed, and what is given only measures. See `quant2e.convert_pt2e`.
    ``allow_unquantized``: accept a result in which no op is quantized. ``min_sqnr_db``: the least SQNR that a result
    must have, in dB; None accepts any. ``progress``: called with the number of batches done and the total, where it is
    known; None shows stages on a terminal (see `quant2e.stages`), False nothing.
    ``evaluate``: a function of a model that returns its metric; groups of ops are left float until no more than
    ``max_drop`` of the float model's is lost (0.01, one per cent, unless told otherwise), with and without
    ``algorithms``: the short form of `quant2e.tune`, which has the trials and more to say.

    ``model`` and its tensors are left untouched. Raises the errors of each step, `CalibrationError` for NaN or +inf in
    any of the data, `Quant2eError` when nothing was quantized, and `AccuracyError`, which names the ops at which it was
    lost, when the output keeps less than ``min_sqnr_db`` of its signal.
    """
    if min_sqnr_db is not None and not isinstance(min_sqnr_db, int | float):
        raise Quant2eError(f"min_sqnr_db={min_sqnr_db!r}: a number of dB, or None to accept any result")
    if calibration_data is not None:
        check_iterable(calibration_data, "calibration_data")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise Quant2eError(f"kwargs is a {type(kwargs).__name__}: keyword inputs by name, a dict")
    by = type(quantizer).__name__
    if recipe is not None:
        quantizer, algorithms = _with_recipe(recipe, quantizer, algorithms)
    if evaluate is not None or max_drop is not None:
        if use_reference_representation or int8_io or encodings is not None or callable(progress):
            raise Quant2eError("evaluate= goes without use_reference_representation, int8_io, encodings and progress")
        return _tuned(
            evaluate,
            max_drop,
            model=model,
            example_inputs=example_inputs,
            quantizer=quantizer,
            calibration_data=calibration_data,
            kwargs=kwargs,
            dynamic_shapes=dynamic_shapes,
            dynamic_batch=dynamic_batch,
            transform=transform,
            algorithms=algorithms,
            progress=progress,
        )
    told = heard(progress)
    if encodings is not None and not algorithms:
        _check_algorithms(encodings, ())
    attempts, enough_db = attempts_of(algorithms), ENOUGH_DB if algorithms == "auto" else math.inf
    captured, given, shapes = capture_call(model, example_inputs, kwargs, dynamic_shapes, dynamic_batch)
    if attempts:
        read_stored(captured)  # algorithms change weights, and keep what they have changed
    prepared = prepare_pt2e(captured, quantizer)
    report = record_of(prepared).report
    if report.quantized_ops == 0 and not allow_unquantized:
        raise Quant2eError(_nothing_quantized(by, report))
    data = None if calibration_data is None else Feed(calibration_data, captured, "calibration", transform)
    if attempts:
        driver = Driver(captured, quantizer, RepeatedData(data, given), enough_db)
        mended = _mended(driver, prepared, attempts, encodings, told)
    else:
        graph = prepared if encodings is None else with_encodings(prepared, encodings)
        mended = Mended(captured, graph, _calibrated(graph, data, given, told))
    once = not attempts and encodings is None and stored_in(mended.prepared)
    converted = _converted(mended.prepared, use_reference_representation, int8_io, once)
    if once:
        hand_back_memory()
    record = record_of(converted)
    report = replace(record.report, algorithms=mended.steps).with_notes(data.notes if data is not None else ())
    report = _measured(report, (captured, mended.prepared, converted), mended.held_out, min_sqnr_db)
    converted.meta[RECORD_KEY] = replace(record, report=report)
    inputs, keywords = _example(converted, *given)
    return QuantizedModel(
        module=converted,
        report=report,
        encodings=encodings_of(replace(record, report=report), by),
        example_inputs=inputs,
        example_kwargs=keywords,
        dynamic_shapes=shapes,
    )


def _mended(
    driver: Driver,
    prepared: GraphModule,
    attempts: Sequence[Attempt],
    encodings: Encodings | None,
    progress: Progress | None,
) -> Mended:
    """What algorithms make of the captured and the prepared graph, with the encodings that were given."""
    if encodings is None:
        return driver.run(prepared, attempts, progress)
    with_encodings(prepared, encodings)  # what is wrong with them is told before anything runs
    mended = driver.run(prepared, attempts, progress)
    _check_algorithms(encodings, kept_algorithms(mended.steps))
    return replace(mended, prepared=with_encodings(mended.prepared, encodings))


def _check_algorithms(encodings: Encodings, kept: tuple[str, ...]) -> None:
    """Raise `AnnotationError` where encodings are of a model that went through other algorithms than this one.

    Encodings without any are taken for every model: files that were written by hand say nothing of them.
    """
    if encodings.algorithms and encodings.algorithms != kept:
        raise AnnotationError(
            f"these encodings were found after {', '.join(encodings.algorithms)}, which changed weights, and this "
            f"model went through {', '.join(kept) or 'no algorithm'}: give algorithms= and the data as then, or load "
            "the quantized model, whose file holds its integers"
        )


def _tuned(evaluate: Evaluate | None, max_drop: float | None, **arguments: Any) -> QuantizedModel:
    """The model that `quant2e.tune` finds.

    Raises `AccuracyError` where it does not keep the goal, and KeyboardInterrupt after Ctrl-C: who called `quantize`
    was told of no search that can end early.
    """
    if evaluate is None:
        raise Quant2eError("max_drop= goes with evaluate=, a function of a model that returns its metric")
    result = tune(evaluate=evaluate, max_drop=0.01 if max_drop is None else max_drop, **arguments)
    if result.interrupted:
        raise KeyboardInterrupt
    if not result.met:
        raise AccuracyError(f"no mix of precisions keeps the goal; quant2e.tune returns the best of them.\n{result}")
    if not result.choices:
        raise AccuracyError(f"the goal is kept only with every op left float; quant2e.tune returns that.\n{result}")
    return result.model


def _with_recipe(
    recipe: Recipe | Mapping[str, Any] | str | Path, quantizer: Quantizer, algorithms: Algorithms
) -> tuple[Quantizer, Algorithms]:
    """The quantizer that asks what a recipe asks, and the algorithms of that, unless others are given."""
    asked = recipe_of(recipe)
    if algorithms and asked.algorithms:
        raise Quant2eError("both the recipe and algorithms= say which algorithms to run: leave one of them out")
    return asked.apply(quantizer), algorithms or asked.algorithms


def _calibrated(
    prepared: GraphModule, data: Iterable[Any] | None, example: Call, progress: Progress | None
) -> HeldOutData:
    """What is held out of ``data``, after ``prepared`` was calibrated in place on the rest."""
    if data is None:
        return HeldOutData([example], "the example inputs")
    return calibrate_but_some(prepared, data, progress)


def _measured(
    report: Report, graphs: tuple[GraphModule, GraphModule, GraphModule], held_out: HeldOutData, least: float | None
) -> Report:
    """The report with the SQNR of the converted graph against the captured one; where it is bad, with the worst places.

    ``graphs``: captured, prepared, converted. Raises `AccuracyError` below ``least`` dB.
    """
    captured, prepared, converted = graphs
    sqnr, place = converted_sqnr(captured, prepared, converted, held_out.calls)
    source = f"{held_out.source}, {place}" if place else held_out.source
    report = replace(report, sqnr_db=sqnr, sqnr_source=source, ranges=ranges_of(held_out.choices))
    lost = least is not None and not sqnr >= least
    if lost:
        _check_float(independent_copy(captured), held_out.calls, held_out.source)
    if lost or not sqnr >= BAD_SQNR_DB:
        places = compare(prepared, in_floats(prepared, converted), held_out.calls[:1]).worst_places()
        report = replace(report, worst_places=tuple(f"{place}: {place.advice}" for place in places))
    if least is not None and lost:
        raise AccuracyError(_lost(report, least))
    return report


def _converted(prepared: GraphModule, reference: bool, int8_io: bool, once: bool) -> GraphModule:
    """The converted graph. ``once``: integers aside, ``prepared`` is ours alone and not converted again."""
    if not int8_io:
        return converted_graph(prepared, reference, last=once and not reference)
    from quant2e.integer import to_integer

    converted = with_quantized_io(converted_graph(prepared))
    return to_integer(converted) if reference else converted


def _check_float(model: GraphModule, held_out: list[Call], source: str) -> None:
    """Raise `CalibrationError` when the float model itself returns NaN: there is no signal to compare with."""
    for index, call in enumerate(held_out):
        leaves = outputs_of(model, call)
        if any(isinstance(x, Tensor) and x.is_floating_point() and bool(torch.isnan(x).any()) for x in leaves):
            raise CalibrationError(
                f"the float model returns NaN on batch {index} of {source}, so nothing can be measured on it; look at "
                "that batch and at the model, or accept any result with min_sqnr_db=None"
            )


def _nothing_quantized(by: str, report: Report) -> str:
    """The error of a quantizer that quantized nothing: the reason in its first sentence, and what to do."""
    asked = [note.removeprefix("recipe:").strip() for note in report.notes if note.startswith("recipe:")]
    reasons = Counter(verdict.reason for verdict in report.verdicts)
    if asked:
        why = f". It cannot do what the recipe asks: {asked[0]}. Ask for what it runs"
    else:
        why = f": {reasons.most_common(1)[0][0]}. " if reasons else ". "
        why += "Give it a configuration (set_global, say) and a model that it has kernels for"
    return (
        f"{by} quantized none of the model's {len(report.verdicts)} float ops{why}, or pass allow_unquantized=True if "
        f"that is what you want.\n{report}"
    )


def _lost(report: Report, wanted: float) -> str:
    head = (
        f"the quantized model keeps too little of the float model's signal: SQNR {report.sqnr_db:.1f} dB on "
        f"{report.sqnr_source}, and at least {wanted:g} dB were asked for. Most is lost at:"
    )
    advice = (
        "Leave these ops float in the quantizer's configuration (by module name, say), or give their weights a scale "
        "per channel; quant2e.check_data looks for outliers in the data. min_sqnr_db=None returns the model as it is."
    )
    found = [*report.worst_places, *report.losses[: len(report.worst_places)]]
    return "\n".join([head, *(f"  {line}" for line in found), advice])


def _example(
    converted: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs as the converted graph takes them."""
    convention = getattr(converted, "inputs", None)
    if convention is None:
        return copy.copy(args), kwargs
    return quantized_io_of(converted).quantize_inputs(convention, args, kwargs)
