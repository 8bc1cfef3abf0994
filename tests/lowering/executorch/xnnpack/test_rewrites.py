"""Each rewrite into XNNPACK's legal form: the graph before and after, and why it does not apply elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowering.executorch.xnnpack.legalize.matmul import batched_matmul
from lowering.executorch.xnnpack.legalize.pointwise import decompose_activations, tensor_operands
from lowering.executorch.xnnpack.legalize.reductions import decompose_normalizations, decompose_reductions
from lowering.executorch.xnnpack.legalize.reshape import one_view
from lowering.executorch.xnnpack.legalize.split_and_join import slice_selects
from quant2e.graph.printer import graph_text
from quant2e.passes import run
from quant2e.passes.dead_code import remove_dead_code

IMAGE, ROWS = torch.randn(1, 4, 6, 6), torch.randn(2, 3, 8)


class Fn(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.vector = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.function(self, x)


def exported(function, x):
    return torch.export.export(Fn(function).eval(), (x,), strict=False).module(check_guards=False)


REWRITES = {
    "hardsigmoid": (decompose_activations, lambda m, x: F.hardsigmoid(x), IMAGE),
    "gelu": (decompose_activations, lambda m, x: F.gelu(x, approximate="tanh"), IMAGE),
    "prelu": (decompose_activations, lambda m, x: F.prelu(x, m.vector), IMAGE),
    "elu": (decompose_activations, lambda m, x: F.elu(x, 0.5), IMAGE),
    "softplus": (decompose_activations, lambda m, x: F.softplus(x), IMAGE),
    "mish": (decompose_activations, lambda m, x: F.mish(x), IMAGE),
    "softmax": (decompose_activations, lambda m, x: torch.softmax(x, 1), IMAGE),
    "layer_norm": (decompose_normalizations, lambda m, x: F.layer_norm(x, (8,)), ROWS),
    "rms_norm": (decompose_normalizations, lambda m, x: F.rms_norm(x, (3, 8)), ROWS),
    "group_norm": (decompose_normalizations, lambda m, x: F.group_norm(x, 2, m.vector, m.vector), IMAGE),
    "instance_norm": (decompose_normalizations, lambda m, x: F.instance_norm(x), IMAGE),
    "mean": (decompose_reductions, lambda m, x: x.mean(1, keepdim=True), ROWS),
    "sum": (decompose_reductions, lambda m, x: x.sum(-1), ROWS),
    "std": (decompose_reductions, lambda m, x: x.std(-1), ROWS),
    "vector_norm": (decompose_reductions, lambda m, x: torch.linalg.vector_norm(x, dim=-1), ROWS),
    "select": (slice_selects, lambda m, x: x.select(1, -1), ROWS),
    "unbind": (slice_selects, lambda m, x: x.unbind(0)[1], ROWS),
    "flatten": (one_view, lambda m, x: x.flatten(1), IMAGE),
    "unsqueeze": (one_view, lambda m, x: x.unsqueeze(1), ROWS),
    "matmul": (batched_matmul, lambda m, x: x @ x.transpose(2, 3), IMAGE),
    "add_number": (tensor_operands, lambda m, x: x + 3, ROWS),
    "number_less": (tensor_operands, lambda m, x: 3 - x, ROWS),
    "reciprocal": (tensor_operands, lambda m, x: 1 / x, ROWS),
    "less_number": (tensor_operands, lambda m, x: x - 3, ROWS),
    "times_number": (tensor_operands, lambda m, x: x * 3, ROWS),
    "by_number": (tensor_operands, lambda m, x: x / 3, ROWS),
    "square": (tensor_operands, lambda m, x: x.square(), ROWS),
    "power_2": (tensor_operands, lambda m, x: x**2, ROWS),
    "power_minus_1": (tensor_operands, lambda m, x: x**-1, ROWS),
    "root": (tensor_operands, lambda m, x: x**0.5, ROWS),
    "cube": (tensor_operands, lambda m, x: x**3, ROWS),
    "inverse_root": (tensor_operands, lambda m, x: x**-0.5, ROWS),
}


@pytest.mark.parametrize("name", REWRITES)
def test_before_and_after(name, golden):
    rewrite, function, x = REWRITES[name]
    module = exported(function, x)
    before = graph_text(module.graph)
    assert rewrite.name in run(module, (rewrite, remove_dead_code))
    golden(f"rewrites/xnnpack/{name}", f"{before}\n\n=>\n\n{graph_text(module.graph)}")


REFUSALS = [
    (decompose_activations, lambda m, x: F.gelu(x), "gelu: 'gelu' has approximate='none'"),
    (decompose_activations, lambda m, x: F.elu(x.double()), "elu: the operand of 'elu' is torch.float64, not float32"),
    (decompose_activations, lambda m, x: F.softplus(x, threshold=5), "'softplus' is linear from 5 on"),
    (decompose_activations, lambda m, x: torch.softmax(x, -1), "'softmax' is over the last dimension, as XNNPACK's"),
    (decompose_activations, lambda m, x: x + x, "no rewrite of decompose_activations is for aten.add.Tensor"),
    (decompose_reductions, lambda m, x: x.mean((1, 2)), "'mean' does not reduce over one dimension of fixed size"),
    (tensor_operands, lambda m, x: x + x, "the second operand of 'add' is a tensor"),
    (tensor_operands, lambda m, x: x**4, "'pow_1' has exponent=4"),
    (batched_matmul, lambda m, x: x @ x[0].t(), "the operands of 'matmul' are not batches of the same sizes"),
    (one_view, lambda m, x: x.view(6, 8), "'view' is such a view"),
]


@pytest.mark.parametrize(("rewrite", "function", "reason"), REFUSALS, ids=[reason for *_, reason in REFUSALS])
def test_a_rewrite_that_does_not_apply_says_why(rewrite, function, reason):
    module = exported(function, ROWS)
    text = graph_text(module.graph)
    assert run(module, (rewrite,)) == {}
    assert graph_text(module.graph) == text
    node = next(node for node in reversed(module.graph.nodes) if node.op == "call_function")
    assert reason in rewrite.explain(node)
