"""One row of ours: float, plain, or with algorithms."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

import quant2e
from benchmarks.accuracy.int8_share import int8_share
from benchmarks.accuracy.row import FLOAT, PLAIN, Row
from benchmarks.accuracy.schemes import SCHEMES, W4, W4_ASYMMETRIC
from benchmarks.accuracy.task import Task
from quant2e.accuracy.output_error import output_sqnr
from quant2e.graph.captured.calls import Call

GPTQ: Sequence[Any] = ("gptq",)
"""What mends 4-bit weights here: the row is about this one algorithm (Frantar et al. 2022)."""


def float_row(task: Task, scheme: str) -> Row:
    """The float model by itself."""
    return Row(
        model=task.name,
        scheme=scheme,
        method=FLOAT,
        measures=dict(task.measure(task.model)),
        samples=task.samples,
        versions=f"torch {torch.__version__}",
    )


def quantized(task: Task, quantizer: Any, algorithms: Any) -> quant2e.QuantizedModel:
    """The whole of it in one call; a result that lost the signal is a result here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return quant2e.quantize(
            task.model,
            task.example_inputs,
            quantizer,
            task.calibration,
            dynamic_shapes=task.dynamic_shapes,
            algorithms=algorithms,
            min_sqnr_db=None,
        )


def our_row(task: Task, scheme: str, method: str) -> Row:
    """``quantize``, plain or with its default ladder; for 4-bit weights with GPTQ alone."""
    make = SCHEMES[scheme].of(method)
    assert make is not None
    mending: Any = GPTQ if scheme in {W4, W4_ASYMMETRIC} else "auto"
    start = time.process_time()
    result = quantized(task, make(), () if method == PLAIN else mending)
    seconds = time.process_time() - start
    return row_of(task, scheme, method, result.module, seconds, notes=tuple(map(str, result.report.algorithms)))


def row_of(
    task: Task, scheme: str, method: str, graph: Any, seconds: float, notes: tuple[str, ...] = (), versions: str = ""
) -> Row:
    """Measures of a Q/DQ graph, whoever made it."""
    measures = dict(task.measure(graph))
    last = task.calibration[-1]
    noise = output_sqnr(task.model, graph, [Call(last, {})])
    return Row(
        model=task.name,
        scheme=scheme,
        method=method,
        measures=measures,
        int8_share=int8_share(graph, task.example_inputs),
        sqnr_db=noise,
        seconds=seconds,
        samples=task.samples,
        notes=notes,
        versions=versions or f"torch {torch.__version__}",
    )
