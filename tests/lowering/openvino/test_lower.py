"""OpenVINO models: what runs on integers, that they compute what the Q/DQ graph says, and their files."""

import sys

import pytest
import torch
from torch import nn

import lowering
from lowering import to_openvino
from lowering.openvino.contents import openvino_contents
from quant2e import LoweringError, capture, quantize
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    Int16Quantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    recipe,
)

IMAGE = (torch.linspace(-2, 2, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin(),)
SEQUENCE = (torch.linspace(-9, 9, 2 * 5 * 32).reshape(2, 5, 32).sin(),)
BATCH = ({0: torch.export.Dim("batch", min=1, max=16)},)


def x86(given="w8a8", **options):
    return X86InductorQuantizer(**options).set_global(given)


def mlp():
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def lowered(model, example, quantizer, **options):
    result = quantize(model.eval(), example, quantizer, [example], **options)
    return result, to_openvino(result)


def needs_openvino():
    for name in ("openvino", "onnx", "onnxscript"):
        pytest.importorskip(name)


def test_a_missing_package_is_named_with_the_extra_before_anything_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(LoweringError, match=r"pip install quant2e\[openvino\]"):
        to_openvino(mlp().eval(), SEQUENCE)


def test_example_inputs_are_needed():
    with pytest.raises(LoweringError, match="to_openvino needs example_inputs"):
        to_openvino(mlp().eval())


@pytest.mark.slow
def test_state_is_refused_by_name():
    needs_openvino()

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = nn.Buffer(torch.zeros(()))

        def forward(self, x):
            self.seen.add_(1)
            return x + self.seen

    with pytest.raises(LoweringError, match=r"OpenVINO model of ours keeps nothing .* writes to seen"):
        to_openvino(capture(Counts().eval(), SEQUENCE), SEQUENCE)


@pytest.fixture(scope="module")
def network():
    needs_openvino()
    torch.manual_seed(0)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), *pool)
    return lowered(model, IMAGE, x86(), dynamic_shapes=BATCH)


@pytest.mark.slow
def test_a_network_of_convolutions(network):
    result, program = network
    report = program.report
    assert report.verification.passed
    assert {op.name for op in report.ops} >= {"conv2d", "conv2d_1"}
    assert all(op.on_integers for op in report.ops)
    assert report.in_float == report.compressed == ()
    assert sum(report.integer_kernels.values()) == len(report.ops)
    assert report.constants["int8"] >= 16 * 27 + 8 * 16 + 4 * 8
    assert "run on integers" in str(report)
    for count in (1, 5, 16):
        x = torch.randn(count, 3, 8, 8)
        torch.testing.assert_close(program(x), result(x), atol=0.01, rtol=0)


@pytest.mark.slow
def test_a_model_is_saved_opened_and_inspected(network, tmp_path):
    _, program = network
    path = tmp_path / "model.xml"
    program.save(path)
    assert lowering.check_file(path)
    opened = lowering.open_program(path)
    assert (opened.unchanged, opened.isolated) == (True, False)
    assert opened.inputs[0].sizes == ((1, 16), (3, 3), (8, 8), (8, 8))
    assert torch.equal(opened.run(IMAGE)[0], program(*IMAGE))
    with pytest.raises(LoweringError, match=r"takes 'input': float32\[1\.\.16, 3, 8, 8\]"):
        opened.run([torch.randn(17, 3, 8, 8)])
    contents = openvino_contents(path)
    assert contents.inputs == ("input: float32[1..16, 3, 8, 8]",)
    assert contents.weights == len(program.weights)
    assert contents.metadata["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0"
    assert "quant2e" in contents.metadata["versions"]
    assert program.compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


@pytest.mark.slow
def test_the_same_graph_is_the_same_bytes(network):
    result, program = network
    again = to_openvino(result, verify=False)
    assert again.report.ops is None
    assert (again.xml, again.weights) == (program.xml, program.weights)


@pytest.mark.slow
def test_other_inputs_are_refused(network):
    _, program = network
    with pytest.raises(LoweringError, match=r"outside of \[1, 16\]"):
        program(torch.randn(17, 3, 8, 8))
    with pytest.raises(LoweringError, match="must have torch.float32"):
        program(torch.randn(2, 3, 8, 8).double())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantizer", "weights", "reason"),
    [
        (lambda: x86("w8"), "i8", ""),
        (lambda: x86("w4-g32"), "i4", ""),
        (lambda: x86("w8a8-dynamic"), "", "found at run time"),
        (lambda: Int16Quantizer().set_global("w8a16"), "", "quantized to 16 bits"),
    ],
    ids=["w8", "w4-g32", "w8a8-dynamic", "w8a16"],
)
def test_products_that_are_computed_in_float_say_why(quantizer, weights, reason):
    needs_openvino()
    _, program = lowered(mlp(), SEQUENCE, quantizer())
    assert program.report.verification.passed
    assert [op.weights for op in program.report.ops] == [weights] * 2
    assert all(reason in op.reason for op in program.report.ops)
    assert len(program.report.in_float) == (2 if reason else 0)
    assert program.report.integer_kernels == {}


@pytest.mark.slow
def test_activations_of_seven_bits_and_a_table():
    needs_openvino()

    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(40, 32), nn.Linear(32, 8)

        def forward(self, ids):
            return self.head(self.table(ids))

    seven = x86(range_policy="7-bit activations")
    quantizer = ComposableQuantizer([EmbeddingQuantizer(), seven])
    _, program = lowered(Lookup(), (torch.arange(6).reshape(2, 3),), quantizer)
    assert program.report.verification.max_steps <= 1
    assert [op.on_integers for op in program.report.ops] == [True]
    assert program.report.constants["int8"] >= 40 * 32 + 32 * 8


@pytest.mark.slow
def test_integer_inputs_and_outputs(tmp_path):
    needs_openvino()
    exact = XNNPACKQuantizer().set_global(recipe("w8a8", weight={"bits": 7}))  # without VNNI, 8 bits saturate
    model = nn.Sequential(nn.Linear(32, 8)).eval()
    program = to_openvino(quantize(model, SEQUENCE, exact, [SEQUENCE], int8_io=True))
    assert program.report.verification.max_steps == 0
    given = torch.randint(-20, 20, (2, 5, 32), dtype=torch.int8)
    assert program(given).dtype is torch.int8
    program.save(tmp_path / "a.xml")
    metadata = openvino_contents(tmp_path / "a.xml").metadata
    assert {"forward_input0_scale", "forward_output0_zp"} <= set(metadata)
    assert openvino_contents(tmp_path / "a.xml").inputs[0].endswith("int8[2, 5, 32]")
