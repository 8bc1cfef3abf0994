"""Control flow in programs: bodies that are quantized inside compute what their graph says, or are refused."""

import pytest
import torch

import lowering
import quant2e
from lowering.control_flow import INSIDE
from lowering.executorch.report import INSIDE as NOT_DELEGATED
from quant2e.errors import LoweringError
from quantizers.x86.quantizer import X86InductorQuantizer
from tests.control_flow_models import Branches, Loop, Mapped, Nested, Recurrent, data, prepared


def converted(kind, quantizer=None):
    return quant2e.convert_pt2e(prepared(kind, quantizer))


def for_inductor(kind):
    return converted(kind, X86InductorQuantizer().set_global("w8a8"))


@pytest.mark.parametrize(
    "kind", [pytest.param(Branches, marks=pytest.mark.slow), Mapped, pytest.param(Recurrent, marks=pytest.mark.slow)]
)
def test_executorch_runs_bodies_in_its_kernels(kind):
    graph, batches = converted(kind), data(kind, 4)
    program = lowering.to_executorch(graph, batches[0], verify_inputs=batches[1:])
    report = program.report
    assert report.verification.passed
    assert any(left.op == "aten.addmm.default" and left.reason == NOT_DELEGATED for left in report.leftovers)
    assert any("only the branches" in note for note in report.notes) is (kind is Branches)
    for x in batches:
        assert torch.allclose(program(*x), graph(*x), atol=1e-5)


def test_executorch_has_no_loop():
    with pytest.raises(LoweringError, match=r"ExecuTorch runs cond, scan, map_impl, and not 'while_loop'"):
        lowering.to_executorch(converted(Loop), data(Loop, 1)[0])


def test_onnx_refuses_integers_inside_and_says_what_to_leave_float(tmp_path):
    with pytest.raises(LoweringError, match=r"set_node\('true_graph_0\.linear_1', None\)"):
        lowering.to_onnx(converted(Branches), data(Branches, 1)[0], path=tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("kind", [Branches, Loop, Recurrent, Mapped, Nested])
def test_inductor_compiles_bodies(kind):
    graph, batches = for_inductor(kind), data(kind, 4)
    program = lowering.to_inductor(graph, batches[0], verify_inputs=batches[1:])
    assert program.report.verification.passed
    inside = [op for op in program.report.ops if "." in op.name]
    assert inside
    assert all(op.reason == INSIDE for op in inside)
    assert any("only the branches" in note for note in program.report.notes) is (kind in (Branches, Nested))
    for x in batches:
        assert torch.allclose(program(*x), graph(*x), atol=1e-5)
