"""Products that become calls of their kernels: the same numbers, what is fused, and what no kernel computes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowering import package_inductor, to_inductor, verify
from lowering.inductor.guard import keep_from_patterns
from lowering.inductor.pipeline import AS_CALLS
from lowering.inductor.rewrites.graph import private_copy
from lowering.inductor.rewrites.kernel_calls import kernel_calls
from lowering.inductor.rewrites.pipeline import REWRITES
from quant2e.graph.dataflow import operands
from quant2e.passes import run
from quant2e.passes.dead_code import remove_dead_code
from tests.lowering.graphs import on_dynamic_grid, on_grid
from tests.lowering.inductor.rewrites.test_pipeline import graph, weight

ROOT = Path(__file__).parents[4]
GENERATOR = torch.Generator().manual_seed(4)
LINE, IMAGE, VOLUME, ROWS = (
    torch.randn(*sizes, generator=GENERATOR) for sizes in ((2, 8, 11), (2, 8, 7, 6), (1, 8, 4, 5, 6), (2, 3, 16))
)
PARTS = {
    "b": torch.randn(6, generator=GENERATOR),
    "b16": torch.randn(6, generator=GENERATOR).bfloat16(),
    "rows": weight(6, 16),
    "square": weight(16, 16),
    "columns": weight(16, 6, axis=1),
    "per_tensor": weight(6, 16, axis=None),
    "line": weight(6, 8, 3),
    "image": weight(6, 8, 3, 3),
    "grouped": weight(8, 2, 3, 3),
    "volume": weight(6, 8, 3, 3, 3),
    "even": weight(6, 8, 2, 3, 4),
    "even_image": weight(6, 8, 3, 2),
    "by_input": weight(16, 6, axis=0),
    "moved": weight(6, 8, 3, 2),
    "up_line": weight(8, 6, 4, axis=1),
    "up": weight(8, 6, 4, 4, axis=1),
    "up_grouped": weight(8, 3, 3, 3, axis=1),
    "up_volume": weight(8, 6, 2, 2, 2, axis=1),
    "up_per_tensor": weight(8, 6, 2, 2, axis=None),
}


def u8(x, scale=0.03, zero_point=128):
    return on_grid(x, (scale, zero_point), torch.uint8)


dyn = on_dynamic_grid
FLOAT, HALF, INT8 = torch.float32, torch.bfloat16, torch.uint8
# function, its input, what the kernel computes besides, the dtype that it returns
CALLED = {
    "linear": (lambda m, x: F.linear(u8(x), m.rows(), m.b), ROWS, "none", FLOAT),
    "linear, gelu": (lambda m, x: F.gelu(F.linear(u8(x), m.rows(), m.b)), ROWS, "gelu", FLOAT),
    "linear, quantized": (lambda m, x: u8(F.linear(u8(x), m.rows(), m.b).relu()), ROWS, "relu", INT8),
    "linear, of two readers": (lambda m, x: (lambda y: y.tanh() + y)(F.linear(u8(x), m.rows())), ROWS, "none", FLOAT),
    "linear, and what is added": (lambda m, x: u8(F.linear(u8(x), m.square()) + x), ROWS, "none", FLOAT),
    "linear, of a row": (lambda m, x: F.linear(u8(x[0, 0]), m.rows(), m.b), ROWS, "none", FLOAT),
    "linear, of a view": (lambda m, x: F.linear(u8(x).view(3, 2, 16), m.rows()), ROWS, "none",
        FLOAT),
    "linear in half precision": (lambda m, x: F.linear(u8(x).bfloat16(), m.rows().bfloat16(), m.b16), ROWS, "none",
        HALF),
    "linear in half precision, of a view": (
        lambda m, x: F.linear(u8(x).bfloat16().flatten(0, 1), m.rows().bfloat16()), ROWS, "none", HALF,
    ),
    "dynamic linear": (lambda m, x: F.linear(dyn(x), m.rows(), m.b), ROWS, "none", FLOAT),
    "product": (lambda m, x: u8(x) @ m.columns(), ROWS, "none", FLOAT),
    "product, turned": (lambda m, x: (u8(x) @ m.rows().mT.clone()).relu(), ROWS, "relu", FLOAT),
    "mm": (lambda m, x: torch.mm(u8(x[0]), m.rows().t()), ROWS, "none", FLOAT),
    "addmm": (lambda m, x: torch.addmm(m.b, u8(x[0]), m.rows().permute(1, 0)), ROWS, "none", FLOAT),
    "addmm, per tensor": (lambda m, x: torch.addmm(m.b, u8(x[0]), m.per_tensor().t()), ROWS, "none", FLOAT),
    "conv, relu": (lambda m, x: F.relu(F.conv2d(u8(x), m.image(), m.b)), IMAGE, "relu", FLOAT),
    "conv, hardtanh, quantized": (
        lambda m, x: u8(F.hardtanh(F.conv2d(u8(x), m.image(), m.b, 2, 1))), IMAGE, "hardtanh", INT8,
    ),
    "conv, leaky_relu": (lambda m, x: F.leaky_relu(F.conv2d(u8(x), m.image())), IMAGE, "none", FLOAT),
    "conv, copied": (lambda m, x: F.conv2d(u8(x).clone(), m.image().contiguous(), m.b), IMAGE, "none", FLOAT),
    "conv in half precision": (
        lambda m, x: F.conv2d(u8(x).bfloat16(), m.image().bfloat16(), m.b16), IMAGE, "none", HALF,
    ),
    "conv in half precision, same size": (
        lambda m, x: F.conv2d(u8(x).bfloat16(), m.image().bfloat16(), padding="same"), IMAGE, "none", HALF,
    ),
    "convolution in one dimension": (
        lambda m, x: torch.ops.aten.convolution(u8(x), m.line(), m.b, [2], [1], [2], False, [0], 1), LINE, "none",
        FLOAT,
    ),
    "conv3d in half precision": (
        lambda m, x: F.conv3d(u8(x).bfloat16(), m.volume().bfloat16(), m.b16), VOLUME, "none", HALF,
    ),
    "transposed in half precision": (
        lambda m, x: F.conv_transpose2d(u8(x).bfloat16(), m.up().bfloat16(), m.b16, 2), IMAGE, "none", HALF,
    ),
    "linear, tanh": (lambda m, x: F.linear(u8(x), m.rows(), m.b).tanh(), ROWS, "tanh", FLOAT),
    "linear, silu, quantized": (lambda m, x: u8(F.silu(F.linear(u8(x), m.rows(), m.b))), ROWS, "swish", INT8),
    "linear, in place": (lambda m, x: F.leaky_relu_(F.linear(u8(x), m.rows()), 0.2) + 1, ROWS, "leaky_relu", FLOAT),
    "linear, clamp": (lambda m, x: u8(F.linear(u8(x), m.rows(), m.b).clamp(-1, 2)), ROWS, "hardtanh", INT8),
    "dynamic linear, hardswish": (lambda m, x: F.hardswish(F.linear(dyn(x), m.rows(), m.b)), ROWS, "hardswish", FLOAT),
    "dynamic conv": (lambda m, x: F.conv2d(dyn(x), m.image(), m.b, 2, 1), IMAGE, "none", FLOAT),
    "dynamic conv, silu": (lambda m, x: F.silu(F.conv2d(dyn(x), m.image(), padding="same")), IMAGE, "swish", FLOAT),
    "dynamic conv, even kernel": (
        lambda m, x: F.conv2d(dyn(x), m.even_image(), m.b, padding="same", dilation=(1, 3)), IMAGE, "none", FLOAT,
    ),
    "conv3d, even kernel": (
        lambda m, x: F.conv3d(u8(x, 0.03, 100), m.even(), m.b, padding="same"), VOLUME, "none", FLOAT,
    ),
    "dynamic conv in groups": (lambda m, x: F.conv2d(dyn(x), m.grouped(), None, 1, 1, 2, 4), IMAGE, "none", FLOAT),
    "dynamic conv1d, relu": (lambda m, x: F.relu(F.conv1d(dyn(x), m.line(), m.b, 2, 1)), LINE, "relu", FLOAT),
    "dynamic conv, tanh": (lambda m, x: F.conv2d(dyn(x), m.image(), m.b).tanh(), IMAGE, "none", FLOAT),
    "conv3d, quantized": (lambda m, x: u8(F.conv3d(u8(x), m.volume(), m.b, 1, 1)), VOLUME, "none", INT8),
    "conv3d, relu": (
        lambda m, x: u8(F.relu(F.conv3d(u8(x), m.volume(), m.b, 1, 1)), 0.03, 0), VOLUME, "none", INT8,
    ),
    "conv3d, relu, another zero": (
        lambda m, x: u8(F.relu(F.conv3d(u8(x), m.volume(), m.b, 1, 1))), VOLUME, "none", FLOAT,
    ),
    "transposed": (lambda m, x: F.conv_transpose2d(u8(x), m.up(), m.b, 2, 1), IMAGE, "none", FLOAT),
    "transposed, relu, quantized": (
        lambda m, x: u8(F.relu(F.conv_transpose2d(u8(x), m.up(), m.b, 2, 1))), IMAGE, "relu", INT8,
    ),
    "transposed in groups, dilated": (
        lambda m, x: F.conv_transpose2d(u8(x), m.up_grouped(), m.b, 2, 1, 1, 2, 2), IMAGE, "none", FLOAT,
    ),
    "transposed in one dimension": (lambda m, x: F.conv_transpose1d(u8(x), m.up_line(), m.b, 3), LINE, "none", FLOAT),
    "transposed in three": (lambda m, x: F.conv_transpose3d(u8(x), m.up_volume(), None, 2), VOLUME, "none", FLOAT),
    "transposed, dynamic": (lambda m, x: F.conv_transpose2d(dyn(x), m.up(), m.b, 2), IMAGE, "none", FLOAT),
    "transposed, per tensor": (lambda m, x: F.conv_transpose2d(u8(x), m.up_per_tensor()), IMAGE, "none", FLOAT),
}  # fmt: skip
NAMES = ("attr", "post_op_name")


def rewritten(function, x):
    model = graph(function, x, **PARTS)
    copy = private_copy(model)
    run(copy, REWRITES, compiled=False)
    keep_from_patterns(copy)
    count = run(copy, (kernel_calls, remove_dead_code), compiled=False)["kernel_calls"]
    copy.graph.lint()
    copy.recompile()
    return model, copy, count


@pytest.mark.parametrize("case", CALLED)
def test_called(case):
    function, x, post_op, dtype = CALLED[case]
    model, copy, count = rewritten(function, x)
    (kernel,) = (operands(node) for node in copy.graph.nodes if str(node.target).startswith("onednn."))
    assert count == 1
    assert next(kernel[name] for name in NAMES if name in kernel) == post_op
    assert kernel["output_dtype"] is dtype
    made, wanted = copy(x)[0], model(x)
    assert made.shape == wanted.shape
    assert made.dtype == wanted.dtype
    if dtype is HALF:  # the graph rounds weights and activations to bfloat16 as well
        assert (made - wanted).norm() < 0.01 * wanted.norm()
    elif (
        dtype is INT8 or case.startswith("conv3d") or "added" in case
    ):  # on the edge between two integers the order of a sum decides
        assert (made - wanted).abs().max() < 0.0301
    else:
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


LEFT = {
    "a float activation": (lambda m, x: F.conv_transpose2d(x, m.up()), IMAGE, None),
    "a float weight": (lambda m, x: F.linear(u8(x), m.rows.scales.expand(16, 6).t()), ROWS, None),
    "float16": (lambda m, x: F.linear(u8(x).half(), m.rows().half()).float(), ROWS, "float32 or bfloat16"),
    "addmm with a factor": (
        lambda m, x: torch.addmm(m.b, u8(x[0]), m.rows().t(), alpha=2.0), ROWS, "none that can be written as one",
    ),
    "scales along the inputs": (lambda m, x: u8(x) @ m.by_input(), ROWS, "none that can be written as one"),
    "a weight that is moved": (lambda m, x: F.conv2d(u8(x), m.moved().transpose(2, 3)), IMAGE, "right in front"),
    "an activation that is moved": (lambda m, x: F.conv2d(u8(x).relu(), m.image()), IMAGE, None),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_no_kernel_computes_is_float_and_says_why(case):
    function, x, reason = LEFT[case]
    model = graph(function, x, **PARTS)
    copy = private_copy(model)
    run(copy, REWRITES, compiled=False)
    reasons = [*keep_from_patterns(copy).values()]
    assert run(copy, (kernel_calls,), compiled=False) == {}
    assert len(reasons) == (reason is not None)
    assert all(reason in each for each in reasons)
    copy.recompile()
    torch.testing.assert_close(copy(x)[0], model(x), rtol=1e-5, atol=1e-5)


def test_results_that_are_viewed_or_written_to_are_as_captured():
    """Kernels write channels last; a view of that, and what is written through one, are those of the captured graph."""

    def function(m, x):
        y = F.conv2d(u8(x), m.image(), m.b)
        y.view(2, 6, -1)[:, :, 0].add_(1)
        return y.view(2, -1).sum(1), y

    model = graph(function, IMAGE, **PARTS)
    copy = private_copy(model)
    run(copy, REWRITES, compiled=False)
    run(copy, AS_CALLS, compiled=False)
    copy.recompile()
    assert "onednn.qconv" in str(copy.graph)
    for made, wanted in zip(copy(IMAGE), model(IMAGE), strict=True):
        assert made.stride() == wanted.stride()
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


class Together(nn.Module):
    """The functions of several cases, each on the input of its shape."""

    def __init__(self, cases):
        super().__init__()
        self.functions = [
            (function, next(i for i, known in enumerate(INPUTS) if known is x)) for function, x, _, _ in cases
        ]
        for name, part in PARTS.items():
            self.register_buffer(name, part) if isinstance(part, torch.Tensor) else self.add_module(name, part)

    def forward(self, *inputs):
        return [function(self, inputs[place]) for function, place in self.functions]


INPUTS = (LINE, IMAGE, VOLUME, ROWS)


def program_inputs(batch):
    return tuple(torch.cat([x] * batch)[:batch] for x in INPUTS)


COMPILED = (
    "linear, in place", "linear, clamp", "dynamic linear, hardswish", "dynamic conv in groups", "dynamic conv1d, relu",
    "conv3d, quantized", "transposed, relu, quantized", "transposed in groups, dilated",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.inductor
def test_compiled_for_any_batch():
    """One program of several: every one an int8 kernel, with its activation, right at every batch."""
    cases = [CALLED[name] for name in COMPILED]
    batch = torch.export.Dim("batch", min=1, max=8)
    model = torch.export.export(
        Together(cases).eval(), program_inputs(3), strict=False, dynamic_shapes=(tuple({0: batch} for _ in INPUTS),)
    ).module()
    program = to_inductor(model, program_inputs(3), engines="onednn")
    assert program.report.leftovers == ()
    assert [op.post_op or "none" for op in program.report.ops] == [post_op for _, _, post_op, _ in cases]
    for size in (1, 2, 8):
        assert verify(program, model, [program_inputs(size)]).max_steps <= 1.001  # a sum between two integers


@pytest.mark.slow
@pytest.mark.inductor
def test_packaged(tmp_path):
    cases = [CALLED[name] for name in ("linear, tanh", "dynamic conv, silu", "conv3d, relu", "transposed")]
    model = torch.export.export(Together(cases).eval(), INPUTS, strict=False).module()
    package = package_inductor(model, INPUTS, path=tmp_path / "model.pt2", engines="onednn")
    assert package.report.leftovers == ()
    assert package.verification.sqnr_db > 50


ALONE = """
import sys, torch
from torch import nn
from lowering import to_inductor
from quant2e import quantize
from quantizers import X86InductorQuantizer

layers = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 8)).eval()
x = torch.randn(2, 4, 6, 6)
result = quantize(layers, (x,), X86InductorQuantizer().set_global("w8a8"), [x])
assert "torchao" not in sys.modules
print(to_inductor(result, engines="onednn").report, end="beside")
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer
print(to_inductor(result, engines="onednn").report, end="")
"""


@pytest.mark.inductor
def test_the_kernels_are_the_same_with_torchao_and_without():
    """torchao adds patterns of its own to Inductor when it is imported."""
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, check=True)
    alone, beside = done.stdout.split("beside")
    assert alone.startswith("2 of 2 ops with quantized operands run as int8 kernels")
    assert beside == alone
