"""The interface: every name that ``quant2e`` offers, imported from where it lives when somebody first asks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quant2e.accuracy.compare import compare
from quant2e.accuracy.recipe.recipe import Recipe
from quant2e.accuracy.sensitivity import sensitivity
from quant2e.accuracy.tuning.tune import tune
from quant2e.annotation.config import QuantizationConfig
from quant2e.annotation.pattern import Match, Op, constant, op
from quant2e.annotation.plan import Edge, Output, Plan
from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import (
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    SharedQuantizationSpec,
)
from quant2e.calibration.calibrate import calibrate
from quant2e.calibration.data_checks import check_data
from quant2e.calibration.progress import ProgressLine
from quant2e.calibration.range_selection import select_ranges
from quant2e.calibration.statistics import Statistics, load_statistics, rederive, save_statistics
from quant2e.convert.convert import convert_pt2e
from quant2e.errors import (
    AnnotationError,
    CalibrationError,
    CaptureError,
    FileFormatError,
    LoweringError,
    PassError,
    PlanError,
    Quant2eError,
)
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.modes import freeze_batch_norm
from quant2e.graph.captured.module import CapturedModule
from quant2e.graph.printer import graph_text
from quant2e.integer import to_integer
from quant2e.pipeline import quantize
from quant2e.prepare.prepare import prepare_pt2e, prepare_qat_pt2e
from quant2e.quantized_io import QuantizedIO, quantized_io_of, with_quantized_io
from quant2e.quantized_model import QuantizedModel, load, load_trusted_program, save
from quant2e.report.encodings import Encodings
from quant2e.report.record import plan_of, report_of
from quant2e.report.report import Report, Verdict
from quant2e.versions import warn_of_untested_torch

if TYPE_CHECKING:
    from quant2e import pt2e

warn_of_untested_torch()


def __getattr__(name: str) -> object:
    """What is looked up when somebody asks for it: the names of `_ELSEWHERE`."""
    from importlib import import_module

    if name == "pt2e":
        return import_module("quant2e.pt2e")
    for module in map(import_module, _ELSEWHERE):
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module 'quant2e' has no attribute {name!r}")


_ELSEWHERE = (
    "quant2e.signature_types",
    "quant2e.integer",
    "quant2e.accuracy.algorithms",
    "quant2e.pt2e",
    "quant2e.training",
    "quant2e.weights",
    "quant2e.pytorch_quantization",
)
"""Public modules whose names can be imported from ``quant2e`` as well, which does not list them."""


__all__ = [
    "AnnotationError",
    "CalibrationError",
    "Call",
    "CaptureError",
    "CapturedModule",
    "DerivedQuantizationSpec",
    "Edge",
    "EdgeOrNode",
    "Encodings",
    "FileFormatError",
    "FixedQParamsQuantizationSpec",
    "LoweringError",
    "Match",
    "Op",
    "Output",
    "PassError",
    "Plan",
    "PlanError",
    "ProgressLine",
    "Quant2eError",
    "QuantizationAnnotation",
    "QuantizationConfig",
    "QuantizationSpec",
    "QuantizedIO",
    "QuantizedModel",
    "Quantizer",
    "Recipe",
    "Report",
    "SharedQuantizationSpec",
    "Statistics",
    "Verdict",
    "calibrate",
    "capture",
    "check_data",
    "compare",
    "constant",
    "convert_pt2e",
    "freeze_batch_norm",
    "graph_text",
    "load",
    "load_statistics",
    "load_trusted_program",
    "op",
    "plan_of",
    "prepare_pt2e",
    "prepare_qat_pt2e",
    "pt2e",
    "quantize",
    "quantized_io_of",
    "rederive",
    "report_of",
    "save",
    "save_statistics",
    "select_ranges",
    "sensitivity",
    "to_integer",
    "tune",
    "with_quantized_io",
]
