"""Compiled programs against their Q/DQ graphs. Few and small: each takes seconds to compile."""

import os
import random
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

import lowering.inductor.program
from lowering import to_inductor, verify
from lowering.inductor.rewrites.graph import private_copy
from lowering.inductor.rewrites.pipeline import REWRITES
from quant2e.errors import LoweringError
from quant2e.graph.qdq_ops import qd
from quant2e.passes.runner import checking
from tests.lowering.graphs import Cnn, Lookup, Weight, on_dynamic_grid, on_grid
from tests.pass_checks import trusting

pytestmark = pytest.mark.inductor

F = torch.nn.functional
UINT8 = torch.uint8


class Fn(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.register_buffer(name, part) if isinstance(part, torch.Tensor) else self.add_module(name, part)

    def forward(self, *args):
        return self.function(self, *args)


def capture(module, *args, **kwargs):
    return torch.export.export(module.eval(), args, strict=False, **kwargs).module()


def u8(x, scale=0.03, zero_point=128):
    return on_grid(x, (scale, zero_point), UINT8)


def weight(*shape, axis=0):
    return Weight(torch.randn(shape), axis)


def agree(program, model, *batches, db=100.0):
    found = verify(program, model, batches)
    assert found.sqnr_db > db, found


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("axis", [0, None], ids=["per channel", "per tensor"])
def test_a_cnn_is_int8_throughout_and_takes_any_batch(axis):
    batch = torch.export.Dim("batch", min=1, max=64)
    image = torch.randn(2, 3, 16, 16)
    model = capture(Cnn(axis), image, dynamic_shapes=({0: batch},))
    text, state = str(model.graph), {k: v.clone() for k, v in model.state_dict().items()}
    program = to_inductor(model, (image,), engines="onednn")
    assert {op.kernel for op in program.report.ops} == {"onednn.qconv", "onednn.qlinear"}
    assert [op.name for op in program.report.int8] == ["conv2d", "conv2d_1", "conv2d_2", "linear"]
    for size in (1, 2, 5, 64):
        found = verify(program, model, [(torch.randn(size, 3, 16, 16),)])
        assert found.max_steps <= 1.001  # a sum on the edge between two integers
    with pytest.raises(LoweringError, match="size is 65"):
        program(torch.randn(65, 3, 16, 16))
    assert str(model.graph) == text
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


class Block(nn.Module):
    """Attention and a feed-forward part, each with a residual and a norm; every linear on a grid."""

    def __init__(self, grid, width=32, heads=4):
        super().__init__()
        self.grid, self.heads = grid, heads
        self.qkvo = nn.ModuleList([weight(width, width) for _ in range(4)])
        self.up, self.down = weight(4 * width, width), weight(width, 4 * width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])

    def forward(self, x):
        def linear(w, value):
            return F.linear(self.grid(value), w())

        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        query, key, value = (linear(w, x).view(split).transpose(1, 2) for w in self.qkvo[:3])
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, width)
        x = self.norms[0](x + linear(self.qkvo[3], mixed))
        return self.norms[1](x + linear(self.down, F.gelu(linear(self.up, x))))


@pytest.mark.parametrize("grid", [u8, on_dynamic_grid], ids=["static", "dynamic"])
def test_a_transformer_is_int8_throughout_and_leaves_its_input_alone(grid):
    x = torch.randn(2, 6, 32)
    model = capture(nn.Sequential(Block(grid), Block(grid)), x)
    program = to_inductor(model, (x,), engines="onednn")
    assert [op.reason for op in program.report.leftovers] == []
    assert len(program.report.int8) == 12
    before = x.clone()
    first = program(x)
    assert torch.equal(x, before)
    assert torch.equal(program(x), first)
    agree(program, model, (torch.randn(2, 6, 32),), db=30.0)


def test_embeddings_keep_their_integers_in_memory():
    ids = torch.randint(0, 5000, (2, 6))
    model = capture(Fn(lambda m, i: m.a(i) + m.b(i), a=Lookup(5000, 64), b=Lookup(5000, 64, axis=None)), ids)
    kept = {}
    original = lowering.inductor.program.int8_kernels

    def look(graph):
        owner = graph.owning_module
        kept.update({n.target: getattr(owner, n.target) for n in graph.nodes if n.op == "get_attr"})
        return original(graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering.inductor.program, "int8_kernels", look)
        program = to_inductor(model, (ids,))
    tables = [t for t in kept.values() if t.numel() >= 5000 * 64]
    assert [t.dtype for t in tables] == [torch.int8, torch.int8]
    assert all("gathers integer rows" in op.reason for op in program.report.leftovers)
    assert torch.equal(program(ids), model(ids))


def test_a_weight_without_an_int8_kernel_is_dequantized_once_not_at_each_call():
    x = torch.randn(4, 32)
    model = capture(Fn(lambda m, x: F.linear(x, m.w()), w=weight(16, 32)), x)
    dtypes = set()
    original = lowering.inductor.program.int8_kernels

    def look(graph):
        owner = graph.owning_module
        dtypes.update(
            getattr(owner, n.target).dtype
            for n in graph.nodes
            if n.op == "get_attr" and getattr(owner, n.target).dim() == 2
        )
        return original(graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering.inductor.program, "int8_kernels", look)
        program = to_inductor(model, (x,), engines="float")
    assert dtypes == {torch.float32}
    assert program.report.of("linear").reason == "chosen by the caller"


# ------------------------------------------------------------------------------- what Inductor alone would get wrong


def dequantized_linear(m, x):
    return F.linear(u8(x), m.w())


WRONG = {
    "transposed convolution": lambda m, x, image: F.conv_transpose2d(u8(image), m.up(), stride=2, padding=1),
    "dynamic range far from zero": lambda m, x, image: F.linear(on_dynamic_grid(x.abs() + 5), m.w()),
    "pool into another scale": lambda m, x, image: u8(F.max_pool2d(u8(image), 2), 0.06, 100),
    "signed output of a convolution": lambda m, x, image: qd.quantize_per_tensor.default(
        F.conv2d(u8(image), m.conv()), 0.05, 3, -128, 127, torch.int8
    ),
    "narrow range behind a linear": lambda m, x, image: qd.dequantize_per_tensor.default(
        qd.quantize_per_tensor.default(dequantized_linear(m, x * 9), 0.02, 64, 0, 127, UINT8), 0.02, 64, 0, 127, UINT8
    ),
    "sum with a factor": lambda m, x, image: torch.add(dequantized_linear(m, x), x.sin(), alpha=3),
    "sum with itself": lambda m, x, image: (lambda y: u8(y + y))(dequantized_linear(m, x)),
    "sum into an input": lambda m, x, image: x + dequantized_linear(m, x),
    "sum into a constant": lambda m, x, image: m.constant + dequantized_linear(m, x),
    "weight scales along the inputs": lambda m, x, image: F.linear(u8(x), m.columns()),
    "signed convolution": lambda m, x, image: F.conv2d(on_grid(image, (0.03, 5)), m.conv()),
    "convolutions in one dimension": lambda m, x, image: F.conv1d(u8(image[0]), m.line(), padding=1),
    "in one dimension, and an addition": lambda m, x, image: F.conv1d(u8(image[0]), m.line(), padding=1) + image[0],
    **{
        f"in one dimension, {act.__name__}": lambda m, x, image, act=act: u8(
            act(F.conv1d(u8(image[0]), m.line(), padding=1))
        )
        for act in (F.relu6, F.hardswish, F.silu, F.relu)
    },
    "in three dimensions": lambda m, x, image: F.conv3d(u8(image[None]), m.cube(), padding=1),
}


@pytest.mark.slow
def test_every_known_wrong_lowering_is_right():
    x, image = torch.randn(8, 8), torch.randn(1, 8, 8, 8)
    parts = {
        "w": weight(8, 8), "columns": weight(8, 8, axis=1), "up": weight(8, 8, 4, 4, axis=1),
            "conv": weight(8, 8, 3, 3),
        "line": weight(8, 8, 3), "cube": weight(8, 1, 3, 3, 3), "constant": torch.randn(8, 8),
    }  # fmt: skip
    model = capture(Fn(lambda m, *inputs: tuple(case(m, *inputs) for case in WRONG.values()), **parts), x, image)
    program = to_inductor(model, (x, image), verify=False, engines="onednn")
    for inputs in [(x, image), (x * 2, image * 2), (torch.randn(8, 8), torch.randn(1, 8, 8, 8))]:
        kept = [t.clone() for t in inputs]
        got, expected = program(*inputs), model(*kept)
        for name, g, e in zip(WRONG, got, expected, strict=True):
            assert (g.shape, g.dtype) == (e.shape, e.dtype), name
            # one integer where a sum lands on the edge between two
            torch.testing.assert_close(
                g.float(), e.float(), rtol=1e-4, atol=0.061 if "sum with itself" in name else 1e-4, msg=name
            )
        assert all(map(torch.equal, inputs, kept))


def test_half_precision_keeps_its_dtype_and_its_kernels():
    x = torch.randn(4, 32)

    def in_half(m, x):
        args = (0.03, 128, 0, 255, UINT8)
        q = qd.quantize_per_tensor.default(x, *args)
        w = qd.dequantize_per_channel.default(
            m.w.stored, m.w.scales, m.w.zero_points, 0, -127, 127, torch.int8, out_dtype=x.dtype
        )
        return F.linear(qd.dequantize_per_tensor.default(q, *args, out_dtype=x.dtype), w)

    model = capture(Fn(in_half, w=weight(16, 32)), x.bfloat16())
    program = to_inductor(model, (x.bfloat16(),), engines="onednn")
    assert program(x.bfloat16()).dtype is torch.bfloat16
    assert program.report.of("linear").kernel == "onednn.qlinear"


# ------------------------------------------------------------------------------------------------- around the program


def test_a_program_that_computes_something_else_raises(monkeypatch):
    def breaks(gm):
        for node in gm.graph.nodes:
            if node.target is qd.dequantize_per_tensor.default:
                node.args = (node.args[0], node.args[1] * 2, *node.args[2:])
        return 1

    model, x = capture(Fn(dequantized_linear, w=weight(8, 8)), torch.randn(4, 8)), torch.randn(4, 8)
    monkeypatch.setattr("lowering.inductor.pipeline.REWRITES", (*REWRITES, breaks))
    with checking(trusting):
        with pytest.raises(LoweringError, match="does not compute what its Q/DQ graph says: FAILED"):
            to_inductor(model, (x,), engines="onednn")
        assert to_inductor(model, (x,), verify=False, engines="onednn").verification is None


def state():
    configs = (inductor_config, dynamo_config, functorch_config)
    return [
        *(repr(config.get_config_copy()) for config in configs),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        list(warnings.filters),
        dict(os.environ),
    ]


def test_every_setting_is_as_before_also_after_a_failure(monkeypatch):
    x, row = torch.randn(4, 8), torch.randn(1, 8)
    model = capture(Fn(dequantized_linear, w=weight(8, 8)), x, dynamic_shapes=(({0: torch.export.Dim("b")},),))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    before = state()
    program = to_inductor(model, (x,))
    assert state() == before
    program(row)  # compiled for one row of its own
    assert state() == before
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda *_: 1 / 0)
    with pytest.raises(LoweringError, match="could not compile the graph: ZeroDivisionError"):
        to_inductor(model, (x,))
    assert state() == before


def test_sizes_may_be_made_dynamic_afterwards_where_the_graph_does_not_spell_them_out():
    x, shapes = torch.randn(4, 8), ({0: torch.export.Dim("b")},)
    w = weight(8, 8)

    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = w

        def forward(self, x):
            return dequantized_linear(self, x)

    model = capture(Free(), x)
    program = to_inductor(model, (x,), dynamic_shapes=shapes)
    assert program(torch.randn(7, 8)).shape == (7, 8)
    with pytest.raises(LoweringError, match="dimension 0 of input 'x' is 7, and the program was compiled for 4"):
        to_inductor(model, (x,))(torch.randn(7, 8))
    spelled = capture(Fn(lambda m, x: x.view(4, 2, 4)), x)
    with pytest.raises(LoweringError, match="captured with fixed sizes at first"):
        to_inductor(spelled, (x,), dynamic_shapes=((shapes),))


def test_others_resetting_dynamo_do_not_reach_the_program():
    x = torch.randn(4, 8)
    program = to_inductor(capture(Fn(dequantized_linear, w=weight(8, 8)), x), x)
    first = program(x)
    torch._dynamo.reset()
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.compile_fx", lambda *_: compiled.append(1))
        assert torch.equal(program(x), first)
    assert compiled == []


def test_a_float_graph_and_a_remembered_example():
    x = torch.randn(3, 4)
    model = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), x)
    program = to_inductor(SimpleNamespace(module=model, example_inputs=(x,), example_kwargs={}, dynamic_shapes=None))
    assert program.report.ops == ()
    assert not program(x).requires_grad
    agree(program, model, (x,))
    turned = torch.randn(4, 3).t()
    agree(program, model, (turned,))


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.ReLU(), (torch.ones(2),), "takes a captured graph, not a ReLU"),
        (3, None, "cannot lower or compare a int"),
    ],
)
def test_what_is_no_graph_is_refused(model, example, message):
    with pytest.raises(LoweringError, match=message):
        to_inductor(model, example)


def test_no_example_inputs_and_no_compiler_say_what_to_do():
    x = torch.randn(4, 8)
    model = capture(Fn(lambda m, x: x.sin() + 12345), x)
    with pytest.raises(LoweringError, match="pass example_inputs"):
        to_inductor(model)
    with (
        inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(LoweringError, match=r"no C\+\+ compiler was found .*install g\+\+"),
    ):
        to_inductor(capture(Fn(lambda m, x: x.cos() * 54321.5), x), (x,))


def test_the_graph_is_copied_without_its_checks_and_with_shared_weights():
    model = capture(Fn(dequantized_linear, w=weight(8, 8)), torch.randn(4, 8))
    copy = private_copy(model)
    assert not [node for node in copy.graph.nodes if node.op == "call_module"]
    assert copy.get_buffer("w.stored").data_ptr() == model.get_buffer("w.stored").data_ptr()


SATURATES = """
import torch
from tests.lowering.inductor.test_program import Fn, F, capture, u8
from tests.lowering.graphs import Weight
from lowering import to_inductor
import lowering.inductor.guard
from quant2e.cpu import TARGETS

x = 2 + torch.rand(64, 256) / 2
model = capture(Fn(lambda m, x: F.linear(u8(x, 0.01, 0), m.w()), w=Weight(torch.randn(64, 256).sign(), steps=127)), x)
print(to_inductor(model, (x,), engines="onednn").report.of("linear").reason)
lowering.inductor.guard.detect = lambda: TARGETS["avx512_vnni"]
try:
    to_inductor(model, (x,), engines="onednn")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_without_vnni_full_ranges_are_computed_in_float_and_a_saturated_program_is_caught():
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SATURATES], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    guarded, caught = done.stdout.strip().splitlines()[-2:]
    assert "may saturate on this CPU, which has no VNNI" in guarded
    assert caught.startswith("LoweringError the program that Inductor made does not compute")
