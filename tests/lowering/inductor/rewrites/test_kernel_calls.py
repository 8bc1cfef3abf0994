"""Products that become calls of their kernels: the same numbers, what is fused, and what is left to the patterns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowering import package_inductor, to_inductor, verify
from lowering.inductor.guard import keep_from_patterns
from lowering.inductor.rewrites.graph import private_copy
from lowering.inductor.rewrites.kernel_calls import kernel_calls
from lowering.inductor.rewrites.pipeline import REWRITES
from quant2e.graph.dataflow import operands
from quant2e.passes import run
from quant2e.passes.dead_code import remove_dead_code
from tests.lowering.graphs import on_dynamic_grid, on_grid
from tests.lowering.inductor.rewrites.test_pipeline import graph, weight

GENERATOR = torch.Generator().manual_seed(4)
LINE, IMAGE, VOLUME, ROWS = (
    torch.randn(*sizes, generator=GENERATOR) for sizes in ((2, 8, 11), (2, 8, 7, 6), (1, 8, 4, 5, 6), (2, 3, 16))
)
PARTS = {
    "b": torch.randn(6, generator=GENERATOR),
    "rows": weight(6, 16),
    "line": weight(6, 8, 3),
    "image": weight(6, 8, 3, 3),
    "grouped": weight(8, 2, 3, 3),
    "volume": weight(6, 8, 3, 3, 3),
    "even": weight(6, 8, 2, 3, 4),
    "even_image": weight(6, 8, 3, 2),
    "up_line": weight(8, 6, 4, axis=1),
    "up": weight(8, 6, 4, 4, axis=1),
    "up_grouped": weight(8, 3, 3, 3, axis=1),
    "up_volume": weight(8, 6, 2, 2, 2, axis=1),
    "up_per_tensor": weight(8, 6, 2, 2, axis=None),
}


def u8(x, scale=0.03, zero_point=128):
    return on_grid(x, (scale, zero_point), torch.uint8)


dyn = on_dynamic_grid
FLOAT, INT8 = torch.float32, torch.uint8
# function, its input, what the kernel computes besides, the dtype that it returns
CALLED = {
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
    if dtype is INT8 or case.startswith("conv3d"):  # on the edge between two integers the order of a sum decides
        assert (made - wanted).abs().max() < 0.0301
    else:
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


LEFT = {
    "conv": lambda m, x: F.relu(F.conv2d(u8(x), m.image(), m.b)),
    "linear": lambda m, x: F.gelu(F.linear(u8(x.flatten(1)[:, :16]), m.rows(), m.b)),
    "an activation with two readers": lambda m, x: (lambda y: y.tanh() + y)(
        F.linear(u8(x.flatten(1)[:, :16]), m.rows())
    ),
    "a float activation": lambda m, x: F.conv_transpose2d(x, m.up()),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_to_the_patterns(case):
    model = graph(LEFT[case], IMAGE, **PARTS)
    copy = private_copy(model)
    run(copy, REWRITES, compiled=False)
    assert run(copy, (kernel_calls,), compiled=False) == {}


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


def test_products_of_half_precision_are_refused():
    model = graph(lambda m, x: F.conv_transpose2d(u8(x).bfloat16(), m.up().bfloat16()).float(), IMAGE, **PARTS)
    copy = private_copy(model)
    run(copy, REWRITES, compiled=False)
    (reason,) = keep_from_patterns(copy).values()
    assert "float32 only" in reason
