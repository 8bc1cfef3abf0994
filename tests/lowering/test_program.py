"""One shape of a lowered program."""

import inspect

import pytest

import lowering
from lowering import (
    ExecuTorchProgram,
    ExecuTorchReport,
    InductorPackage,
    InductorProgram,
    InductorReport,
    LoweredProgram,
    LoweringReport,
    OnnxProgram,
    OnnxReport,
)

PROGRAMS = (InductorProgram, InductorPackage, ExecuTorchProgram, OnnxProgram)
LOWERINGS = (lowering.to_inductor, lowering.package_inductor, lowering.to_executorch, lowering.to_onnx)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_the_shape(program):
    assert issubclass(program, LoweredProgram)
    assert not inspect.isabstract(program)
    assert {"report", "verification", "save", "__call__"} <= set(dir(program))


@pytest.mark.parametrize("report", [InductorReport, ExecuTorchReport, OnnxReport])
def test_every_report_has_the_shape(report):
    assert issubclass(report, LoweringReport)
    assert {"notes", "verification"} <= set(inspect.signature(report).parameters)


@pytest.mark.parametrize("lower", LOWERINGS)
def test_every_lowering_takes_what_the_others_take(lower):
    parameters = inspect.signature(lower).parameters
    assert list(parameters)[:2] == ["model", "example_inputs"]
    assert {"dynamic_shapes", "verify", "verify_inputs"} <= set(parameters)
    writes = lower in (lowering.package_inductor, lowering.to_onnx)
    assert ("path" in parameters) is writes
    if writes:
        assert parameters["path"].default is inspect.Parameter.empty
        with pytest.raises(TypeError, match="required keyword-only argument: 'path'"):
            lower(None)
