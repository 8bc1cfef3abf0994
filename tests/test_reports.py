"""Reports of all kinds: a JSON form without loss of words, a short form, and HTML in which text is text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lowering import (
    Bound,
    ExecuTorchReport,
    InductorReport,
    Leftover,
    LoweredOp,
    OnnxReport,
    OpenVINOReport,
    Partition,
    Verification,
)
from lowering.bench.command import Row
from lowering.bench.worker import Footprint
from lowering.executorch.report import report_on_program
from lowering.inductor.kernels.engines import KernelChoice, Product
from lowering.openvino.precision import RunOp
from quant2e import Edge, Group, IntegerReport, IntegerVerdict, Output, Plan, RangeChoice, Report
from quant2e.annotation.plan import Ignored
from quant2e.calibration.data_checks import DataFinding, DataReport
from quant2e.errors import FileFormatError
from quant2e.integer import Overflow
from quant2e.report.algorithm_step import AlgorithmStep
from quant2e.report.float_ops import FloatOp
from quant2e.report.report import Verdict
from quantizers.conformance import Conformance, Finding
from quantizers.conformance.program import Given, Program

INF = float("inf")
EQUAL = Verification(
    max_steps=0.0, max_abs_diff=0.0, sqnr_db=INF, mismatches=0.0, batches=2, step_rule="steps", bound=Bound()
)
CLOSE = replace(EQUAL, max_steps=1.0, sqnr_db=52.0)
CHOICE = KernelChoice(engine="float", product=Product(x=(1, 8), weight=(4, 8)), seconds={"float": 1e-6, "onednn": 2e-6})
INDUCTOR = InductorReport(
    ops=(
        LoweredOp(name="linear", target="aten.linear.default", kernel="onednn.qlinear", reason="", place="linear"),
        LoweredOp(name="mm", target="aten.mm.default", kernel="float", reason="a < b", place="<lambda>"),
    ),
    notes=("float copies take 1 MiB",),
    engines={"mm": CHOICE},
    verification=EQUAL,
)
EXECUTORCH = ExecuTorchReport(
    partitions=(Partition(backend="XnnpackBackend", ops={"aten.linear.default": 2}),),
    leftovers=(Leftover(op="aten.topk.default", place="topk", reason="no rule for <topk>"),),
    rewrites={"gelu": 1},
    size=1000,
    verification=CLOSE,
)
ONNX = OnnxReport(
    opset=21,
    convention="onnxruntime",
    size=10,
    constants={"INT8": 8},
    integer_kernels={"QGemm": 1},
    float_products=("MatMul '<mm>': neither operand is quantized",),
    verification=EQUAL,
)
OPENVINO = OpenVINOReport(
    version="2026.4",
    size=10,
    constants={"int8": 8},
    ops=(
        RunOp(name="conv", layer="Convolution", kernel="jit_avx2_I8", precision="u8"),
        RunOp(name="mm", layer="FullyConnected", kernel="brgemm_avx2_f32", precision="i8", weights="i8"),
        RunOp(name="<mm>", layer="MatMul", kernel="jit_f32", precision="f32", reason="16 bits"),
    ),
    verification=EQUAL,
)
REPORTS = {
    "quantization": Report(
        (Verdict(FloatOp("linear", "aten.linear.default", "fc", "m.py:3", 32), "static", "linear"),),
        sqnr_db=INF,
        algorithms=(
            AlgorithmStep("equalize", "kept", ("<lambda>: 8 channels",), before_db=8.5, after_db=INF),
            AlgorithmStep("gptq", "not tried", reason="8 bits"),
        ),
    ),
    "integer": IntegerReport("float32", (IntegerVerdict("linear", "aten.linear.default", True, "linear", True),)),
    "overflow": Overflow(name="mm", sums=8, overflowing=2, wrong=1, peak=40000, limit=32767, worst_error=9),
    "data": DataReport(
        (DataFinding("few", "", "only 1 sample"), DataFinding("non-finite", "'<lambda>'", "3 values")), 1, 1
    ),
    "ranges": RangeChoice("o", "x", {("mse", 99.99): 0.1, ("minmax", 99.99): 0.0}),
    "conformance": Conformance(
        quantizer="Mine",
        findings=(Finding("sqnr", "far off", reproducer=Program((Given((1, 2)),), (), ())),),
        examples=3,
        reached={"linear": 2},
        seed=0,
        complete=True,
    ),
    "verification": EQUAL,
    "inductor": INDUCTOR,
    "executorch": EXECUTORCH,
    "executorch, two methods": report_on_program({"encode": EXECUTORCH, "decode": EXECUTORCH}),
    "onnx": ONNX,
    "openvino": OPENVINO,
    "bench": Row(path=Path("a.pte"), size=1, footprint=Footprint(load_ms=1.0, peak_mb=2.0), medians={1: 3.0},
        ratios={1: 1.0}),
}  # fmt: skip
OF_PROGRAMS = ("inductor", "executorch", "executorch, two methods", "onnx", "openvino", "verification")


@pytest.mark.parametrize("kind", REPORTS)
def test_every_report_has_a_json_form(kind, golden):
    text = json.dumps(REPORTS[kind].as_dict(), allow_nan=False, indent=1)
    golden(f"reports/json/{kind.replace(', ', '_').replace(' ', '_')}", text)


@pytest.mark.parametrize("sqnr_db", [None, 31.5, INF, -INF])
def test_the_json_form_of_a_quantization_is_read_again(sqnr_db):
    report = replace(REPORTS["quantization"], sqnr_db=sqnr_db)
    assert Report.from_dict(json.loads(json.dumps(report.as_dict(), allow_nan=False))) == report


def test_a_report_of_before_there_were_algorithms_is_read():
    data = REPORTS["quantization"].as_dict()
    del data["algorithms"]
    assert Report.from_dict(data) == replace(REPORTS["quantization"], algorithms=())
    data["algorithms"] = [{**REPORTS["quantization"].as_dict()["algorithms"][0], "outcome": "perfect"}]
    with pytest.raises(FileFormatError, match="'perfect' is no outcome: kept, rolled back"):
        Report.from_dict(data)


@pytest.mark.parametrize("kind", [*OF_PROGRAMS, "data", "quantization"])
def test_the_short_form_fits_a_screen_and_html_is_escaped(kind, golden):
    report = REPORTS[kind]
    assert len(repr(report).splitlines()) <= 10
    golden(f"reports/short/{kind.replace(', ', '_').replace(' ', '_')}", repr(report))
    html = report._repr_html_()
    assert html.startswith("<table><caption")
    assert html.endswith("</table>")
    assert not any(text in html for text in ("<lambda>", "<topk>", "<mm>", "a < b"))


def test_many_notes_are_counted():
    many = replace(INDUCTOR, notes=tuple(map(str, range(20))))
    assert repr(many).splitlines()[1] == f"  against its Q/DQ graph: {EQUAL}"
    assert repr(many).splitlines()[-1] == "  … 14 more notes"
    assert len(repr(many).splitlines()) == 9


def test_findings_are_summed_up_a_line_each():
    conformance = REPORTS["conformance"]
    assert repr(conformance).splitlines() == [
        "Conformance of Mine: FAILED: 1 sqnr (3 graphs, seed 0)",
        "  finding: sqnr: far off",
    ]
    assert "far off" in conformance._repr_html_()
    many = replace(conformance, findings=conformance.findings * 30)
    assert repr(many).splitlines()[7:] == ["  … 24 more findings"]


def test_several_methods_are_summed_up_and_the_worst_comparison_counts():
    worse = replace(EXECUTORCH, verification=replace(CLOSE, sqnr_db=45.0))
    report = report_on_program({"encode": EXECUTORCH, "decode": worse})
    assert (report.delegated_ops, len(report.leftovers), report.rewrites, report.size) == (4, 2, {"gelu": 2}, 1000)
    assert report.verification is worse.verification
    assert report_on_program({"forward": EXECUTORCH}) is EXECUTORCH


def test_findings_on_data_are_counted_by_kind_and_are_a_sequence_of_lines():
    report = REPORTS["data"]
    assert [finding.kind for finding in report] == ["few", "non-finite"]
    assert str(report).splitlines() == ["only 1 sample", "'<lambda>': 3 values"]
    many = replace(report, findings=report.findings * 40)
    assert len(repr(many).splitlines()) <= 10
    assert not replace(report, findings=())
    assert repr(replace(report, findings=())) == "DataReport: nothing found (1 samples in 1 batches)"


def test_a_plan_prints_its_size():
    groups = tuple(Group(None, (Output(f"x{i}"), Edge(f"x{i}", f"y{i}"))) for i in range(50))
    assert repr(Plan(groups)) == "Plan(50 groups of 100 points)"
    assert repr(Plan(groups, (Ignored(Output("i"), "a long"),))) == "Plan(50 groups of 100 points, 1 ignored)"
