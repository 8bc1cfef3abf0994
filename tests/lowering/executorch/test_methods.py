"""Programs with integer inputs and outputs, and programs with several methods."""

import pytest
import torch
from torch import nn

from lowering import to_executorch
from quant2e import with_quantized_io
from quant2e.errors import LoweringError
from tests.lowering.graphs import Cnn, Weight, on_grid

pytest.importorskip("executorch")

F = torch.nn.functional
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def capture(module, *args):
    return torch.export.export(module.eval(), args, strict=False).module()


def in_runtime(program, method, *inputs):
    """What a method of the file returns when the runtime alone reads it."""
    from executorch.runtime import Runtime

    return Runtime.get().load_program(program.buffer).load_method(method).execute(inputs)


def test_integers_in_and_out_with_published_parameters():
    floats = capture(Cnn(), IMAGE)
    graph = with_quantized_io(floats)
    port = graph.meta["quantized_boundary"].inputs[0]
    program = to_executorch(graph, (port.quantize(IMAGE),))
    (partition,) = program.report.partitions
    assert program.report.leftovers == ()
    assert partition.ops["quantized_decomposed.dequantize_per_tensor.default"]
    # 0.03, 3 and 0.01, 0 are written in the model
    assert program.constants == {
        "forward_input0_scale": 0.03,
        "forward_input0_zp": 3,
        "forward_input0_quant_min": -128,
        "forward_input0_quant_max": 127,
        "forward_input0_dtype": 1,
        "forward_output0_scale": 0.01,
        "forward_output0_zp": 0,
        "forward_output0_quant_min": -128,
        "forward_output0_quant_max": 127,
        "forward_output0_dtype": 1,
    }
    assert {name: in_runtime(program, name)[0] for name in program.constants} == program.constants
    # an application that knows the file only: quantize by what it publishes, run, dequantize by what it publishes
    known = {name: in_runtime(program, name)[0] for name in program.constants}
    q = (IMAGE / known["forward_input0_scale"]).round().add(known["forward_input0_zp"]).clamp(-128, 127).to(torch.int8)
    (out,) = in_runtime(program, "forward", q)
    assert out.dtype is torch.int8
    steps = out.to(torch.int32) - (floats(IMAGE) / known["forward_output0_scale"]).round().to(torch.int32)
    assert steps.abs().max() <= 1


def test_integer_inputs_and_outputs_are_read_from_a_graph_that_says_nothing_about_it():
    graph = with_quantized_io(capture(Cnn(), IMAGE))
    q = graph.meta["quantized_boundary"].inputs[0].quantize(IMAGE)
    program = to_executorch(torch.export.export(graph, (q,)).module(), (q,))
    assert program.constants["forward_input0_scale"] == 0.03
    assert program.constants["forward_output0_zp"] == 0
    (method,) = program.methods.values()
    assert [port.index for port in method.quantized_io.outputs] == [0]


class Half(nn.Module):
    """Two of these share one table of weights."""

    def __init__(self, weight, backwards):
        super().__init__()
        self.weight, self.backwards = weight, backwards

    def forward(self, x):
        return on_grid(F.linear(on_grid(x, (0.02, 0)), self.weight()), (0.1, 0)) * (-1 if self.backwards else 1)


def test_several_methods_share_their_weights():
    weight = Weight(torch.randn(256, 256))
    models = {name: capture(Half(weight, name == "decode"), torch.randn(2, 256)) for name in ("encode", "decode")}
    program = to_executorch(
        models,
        {"encode": (torch.randn(2, 256),), "decode": (torch.randn(2, 256),)},
        dynamic_shapes={"decode": ({0: torch.export.Dim("batch", min=1, max=4)},)},
        verify_inputs={"encode": [(torch.randn(2, 256),)]},
    )
    assert list(program.methods) == ["encode", "decode"]
    assert [method.report.verification.batches for method in program.methods.values()] == [2, 1]
    assert len(program.buffer) < 1.5 * 256 * 256
    assert program.methods["decode"](torch.randn(3, 256)).shape == (3, 256)
    x = torch.randn(2, 256)
    assert torch.equal(program.methods["encode"](x), -program.methods["decode"](x))
    with pytest.raises(LoweringError, match=r"has the methods encode, decode: choose one"):
        program(x)
    reports = {name: method.report for name, method in program.methods.items()}
    assert program.report.methods == reports
    assert program.report.partitions == tuple(p for report in reports.values() for p in report.partitions)
    assert program.report.size == len(program.buffer)
    assert program.verification in {method.verification for method in program.methods.values()}
    assert "method 'decode': 1 delegate(s)" in str(program.report)
    assert repr(program).startswith("ExecuTorchProgram: 2 methods: 2 delegate(s)")


@pytest.mark.parametrize(
    ("models", "inputs", "message"),
    [
        ({"a b": nn.ReLU()}, (torch.ones(2),), r"named by identifiers, not \['a b'\]"),
        ({}, (torch.ones(2),), r"named by identifiers, not \[\]"),
        ({"a": nn.ReLU()}, {"b": (torch.ones(2),)}, r"example_inputs has the keys \['b'\].*their names \['a'\]"),
        ({"a": nn.ReLU(), "b": nn.ReLU()}, {"a": (torch.ones(2),)}, r"needs example_inputs"),
    ],
)
def test_methods_are_named_once_and_given_by_name(models, inputs, message):
    with pytest.raises(LoweringError, match=message):
        to_executorch(models, inputs)
