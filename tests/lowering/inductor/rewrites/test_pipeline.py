"""Each rewrite keeps the eager result bit for bit, and leaves the form that the kernel calls ask for."""

import pytest
import torch
from torch import nn

from lowering.inductor.rewrites.embedding import gathered_rows
from lowering.inductor.rewrites.fusion import idle_dropouts
from lowering.inductor.rewrites.graph import private_copy
from lowering.inductor.rewrites.padding import numbered_padding
from lowering.inductor.rewrites.pipeline import (
    REWRITES,
    constant_parameters,
    convert_after_dequantize,
    dequantize_last,
    dynamic_parameters,
    narrow_ranges,
    one_dequantize_per_user,
    positional_arguments,
    single_precision,
    token_parameters,
    unsigned_activations,
)
from lowering.inductor.rewrites.weights import (
    explicit_zero_points,
    float_biases,
    folded_weights,
    per_channel_weights,
    weights_by_output,
)
from quant2e.graph.qdq_ops import qd
from quant2e.passes import run
from quant2e.passes.dead_code import remove_dead_code
from tests.lowering.graphs import Cnn, DynamicAttentionInput, Lookup, Weight, by_token, on_dynamic_grid, on_grid

F = torch.nn.functional
INT8, UINT8 = (-128, 127, torch.int8), (0, 255, torch.uint8)
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)) * 3
IDS = torch.tensor([[3, 0, 49], [3, 7, 1]])


class Fn(nn.Module):
    """A function of the inputs and of some modules and tensors, which become weights."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.register_buffer(name, part) if isinstance(part, torch.Tensor) else self.add_module(name, part)

    def forward(self, *args):
        return self.function(self, *args)


def graph(function, *inputs, dynamic_shapes=None, **parts):
    exported = torch.export.export(Fn(function, **parts).eval(), inputs, strict=False, dynamic_shapes=dynamic_shapes)
    return exported.module()


def weight(*shape, axis=0, zero_point=0):
    return Weight(torch.randn(shape, generator=torch.Generator().manual_seed(2)), axis, zero_point)


def targets(gm):
    return [
        str(node.target).removeprefix("quantized_decomposed.") for node in gm.graph.nodes if node.op == "call_function"
    ]


def test_idle_dropouts_go():
    model = graph(
        lambda m, x: m.d(F.linear(x, m.w())) + F.dropout(x, 0.5, False), X, w=weight(16, 16), d=nn.Dropout(0.1)
    )
    copy = private_copy(model)
    idle_dropouts(copy)
    copy.recompile()
    assert not any("dropout" in target for target in targets(copy))
    assert torch.equal(copy(X)[0], model(X))
    training = torch.export.export(Fn(lambda m, x: F.dropout(x, 0.5, True)), (X,), strict=False).module()
    copy = private_copy(training)
    idle_dropouts(copy)
    assert targets(copy) == ["aten.dropout.default"]


def narrow(x):
    return qd.dequantize_per_tensor.default(
        qd.quantize_per_tensor.default(x, 0.03, 64, 0, 127, torch.uint8), 0.03, 64, 0, 127, torch.uint8
    )


def tensor_parameters(m, x):
    q = qd.quantize_per_tensor.tensor(x, m.scale, m.zero_point, *INT8)
    return qd.dequantize_per_tensor.tensor(q, m.scale, m.zero_point, *INT8)


def in_half(dtype):
    return lambda m, x: qd.dequantize_per_tensor.default(
        qd.quantize_per_tensor.default(x, 0.03, 5, *INT8), 0.03, 5, *INT8, out_dtype=dtype
    )


def integers_stay(m, x):
    q = qd.quantize_per_tensor.default(x, 0.03, 5, *INT8)
    return q, qd.dequantize_per_tensor.default(q, 0.03, 5, *INT8)


SCALE, POINT = torch.tensor(0.03), torch.tensor(5)
BIAS = torch.arange(-8, 8, dtype=torch.int32)
FLOAT_WEIGHT, SCALES, POINTS = torch.randn(8, 16), torch.rand(8) * 0.1 + 0.01, torch.zeros(8, dtype=torch.int64)

# rewrite, what it is tried on, a target that must be in the result, a target that must be gone
TABLE = {
    "keyword arguments": (
        positional_arguments,
        graph(lambda m, x: qd.quantize_per_tensor.default(x, scale=0.1, zero_point=3, quant_min=-128, quant_max=127,
            dtype=torch.int8), X),
        (X,), "quantize_per_tensor.default", "",
    ),
    "constant tensor parameters": (
        constant_parameters, graph(tensor_parameters, X, scale=SCALE, zero_point=POINT), (X,),
        "dequantize_per_tensor.default", "dequantize_per_tensor.tensor",
    ),
    "unfolded weight": (
        folded_weights,
        graph(lambda m, x: x @ qd.dequantize_per_channel.default(qd.quantize_per_channel.default(m.w, m.s, m.z, 0,
            *INT8), m.s, m.z, 0, *INT8).t(), X, w=FLOAT_WEIGHT, s=SCALES, z=POINTS),
        (X,), "dequantize_per_channel.default", "quantize_per_channel.default",
    ),
    "no zero points": (
        explicit_zero_points,
        graph(lambda m, x: F.linear(x, qd.dequantize_per_channel.default(m.w.stored, m.w.scales, None, 0, *INT8)), X,
            w=weight(8, 16)),
        (X,), "dequantize_per_channel.default", "",
    ),
    "int32 bias": (
        float_biases,
        graph(lambda m, x: x + qd.dequantize_per_tensor.default(m.b, 0.01, 0, -(2**31), 2**31 - 1, torch.int32), X,
            b=BIAS),
        (X,), "aten.add.Tensor", "dequantize_per_tensor.default",
    ),
    "embedding": (gathered_rows, graph(lambda m, i: m.table(i), IDS, table=Lookup()), (IDS,), "aten.index.Tensor",
        "dequantize_per_channel.default"),
    "embedding with zero points": (gathered_rows, graph(lambda m, i: m.table(i), IDS, table=Lookup(zero_point=3)),
        (IDS,), "aten.index.Tensor", "dequantize_per_channel.default"),
    "embedding per tensor": (gathered_rows, graph(lambda m, i: m.table(i), IDS, table=Lookup(axis=None)), (IDS,),
        "dequantize_per_tensor.default", ""),
    "clone in between": (dequantize_last, graph(lambda m,
        x: F.linear(on_grid(x, (0.03, 5)).swapaxes(0, 1).clone(), m.w()), X, w=weight(8, X.shape[0])), (X,),
            "aten.clone.default", ""),
    "per-tensor weight, mT": (
        per_channel_weights, graph(lambda m, x: on_grid(x, (0.1, 0)) @ m.w().mT, X, w=weight(8, 16, axis=None)), (X,),
        "dequantize_per_channel.default", "",
    ),
    "per-tensor weight": (
        per_channel_weights, graph(lambda m, x: F.linear(on_grid(x, (0.1, 0)), m.w()), X, w=weight(8, 16, axis=None)),
            (X,),
        "dequantize_per_channel.default", "",
    ),
    "per-tensor weight, transposed": (
        per_channel_weights, graph(lambda m, x: on_grid(x, (0.1, 0)) @ m.w().t(), X, w=weight(8, 16, axis=None)), (X,),
        "dequantize_per_channel.default", "",
    ),
    "bfloat16": (convert_after_dequantize, graph(in_half(torch.bfloat16), X.bfloat16()), (X.bfloat16(),),
        "aten.to.dtype", ""),
    "float16": (single_precision, graph(in_half(torch.float16), X.half()), (X.half(),), "aten.to.dtype", ""),
    "dynamic": (dynamic_parameters, graph(lambda m, x: on_dynamic_grid(x), X), (X,), "aten.aminmax.default",
        "choose_qparams.tensor"),
    "dynamic, far from zero": (dynamic_parameters, graph(lambda m, x: on_dynamic_grid(x), X), (X.abs() + 5,),
        "aten.aminmax.default", "choose_qparams.tensor"),
    "dynamic, all negative": (dynamic_parameters, graph(lambda m, x: on_dynamic_grid(x), X), (-X.abs() - 5,),
        "aten.aminmax.default", "choose_qparams.tensor"),
    "dynamic, all zero": (dynamic_parameters, graph(lambda m, x: on_dynamic_grid(x), X), (X * 0,),
        "aten.aminmax.default", "choose_qparams.tensor"),
    "dynamic, symmetric": (
        dynamic_parameters, graph(lambda m, x: on_dynamic_grid(x, qd.choose_qparams_symmetric.tensor), X), (X,),
        "aten.aminmax.default", "choose_qparams_symmetric.tensor",
    ),
    "tokens": (token_parameters, graph(lambda m, x: by_token(x), X), (X,), "aten.round.default", "per_token.default"),
    "narrow range": (narrow_ranges, graph(lambda m, x: narrow(x), X), (X,), "aten.minimum.default", ""),
    "signed": (unsigned_activations, graph(lambda m, x: on_grid(x, (0.03, 5)), X), (X,), "quantize_per_tensor.default",
        ""),
    "signed, returned": (unsigned_activations, graph(integers_stay, X), (X,), "quantize_per_tensor.default", ""),
    "signed, dynamic": (unsigned_activations, graph(lambda m, x: on_dynamic_grid(x), X), (X,),
        "quantize_per_tensor.tensor", ""),
    "signed, dynamic, symmetric": (
        unsigned_activations, graph(lambda m, x: on_dynamic_grid(x, qd.choose_qparams_symmetric.tensor), X), (X,),
        "quantize_per_tensor.tensor", "",
    ),
    "view in between": (dequantize_last, graph(lambda m, x: F.linear(on_grid(x, (0.03, 5)).view(2, 32), m.w()), X,
        w=weight(8, 32)), (X,), "aten.view.default", ""),
    "one dequantize, three users": (one_dequantize_per_user, graph(lambda m, x: m.d(x), X, d=DynamicAttentionInput()),
        (X,), "dequantize_per_tensor.tensor", ""),
    "same size": (numbered_padding, graph(lambda m, x: F.conv1d(narrow(x[None]), m.w(), padding="same", dilation=2), X,
        w=weight(8, 4, 3)), (X,), "aten.conv1d.default", "aten.conv1d.padding"),
    "same size, even kernel": (numbered_padding, graph(lambda m, x: F.conv2d(narrow(x.view(1, 4, 4, 4)), m.w(),
        padding="same"), X, w=weight(8, 4, 2, 4)), (X,), "aten.constant_pad_nd.default", "aten.conv2d.padding"),
    "same size, even kernel, dynamic": (numbered_padding, graph(lambda m, x: F.conv1d(on_dynamic_grid(x[None]), m.w(),
        padding="same"), X, w=weight(8, 4, 2)), (X,), "aten.constant_pad_nd.default", "aten.conv1d.padding"),
    "everything": (
        lambda gm: run(gm, REWRITES), graph(lambda m, x: m.c(x), torch.randn(1, 3, 8, 8), c=Cnn(None)),
        (torch.randn(1, 3, 8, 8),), "dequantize_per_channel.default", "",
    ),
}  # fmt: skip


def leaves(value):
    return value if isinstance(value, tuple | list) else (value,)


@pytest.mark.parametrize("case", TABLE)
def test_the_eager_result_is_bit_equal(case):
    rewrite, model, inputs, present, gone = TABLE[case]
    before, text = [t.clone() for t in leaves(model(*inputs))], str(model.graph)
    copy = private_copy(model)
    rewrite(copy)
    copy.graph.lint()
    copy.recompile()
    after = leaves(copy(*inputs))
    assert [t.dtype for t in after] == [t.dtype for t in before]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert present in targets(copy)
    assert gone not in targets(copy)
    assert str(model.graph) == text


def test_signed_activations_become_unsigned_ones():
    copy = private_copy(graph(lambda m, x: on_grid(x, (0.03, 5)), X))
    unsigned_activations(copy)
    calls = [node.args[1:] for node in copy.graph.nodes if node.op == "call_function"]
    assert calls == [(0.03, 133, 0, 255, torch.uint8)] * 2


def test_weights_of_matrix_products_are_turned_so_that_each_output_is_a_row():
    model = graph(lambda m, x: on_grid(x, (0.1, 0)) @ m.w(), X, w=weight(16, 8, axis=1))
    copy = private_copy(model)
    run(copy, (weights_by_output, remove_dead_code))
    copy.recompile()
    rows = next(n for n in copy.graph.nodes if n.target is qd.dequantize_per_channel.default)
    assert (getattr(copy, rows.args[0].target).shape, rows.args[3]) == ((8, 16), 0)
    torch.testing.assert_close(copy(X)[0], model(X), rtol=0, atol=1e-5)


def test_each_user_gets_a_dequantize_that_equals_no_other():
    copy = private_copy(graph(lambda m, x: m.d(x), X, d=DynamicAttentionInput()))
    one_dequantize_per_user(copy)
    found = [n.args for n in copy.graph.nodes if n.target is qd.dequantize_per_tensor.tensor]
    assert len(found) == len(set(found)) == 3


def test_a_private_copy_writes_to_buffers_of_its_own_under_every_name():
    def step(m, x):
        m.view[0].add_(1)
        return x + m.state

    state = torch.zeros(4)
    model = graph(step, torch.zeros(4), state=state, view=state.view(2, 2))
    copy = private_copy(model)
    assert [copy(torch.zeros(4))[0].tolist() for _ in range(2)] == [[1, 1, 0, 0], [2, 2, 0, 0]]
    assert model.state.tolist() == [0, 0, 0, 0]
