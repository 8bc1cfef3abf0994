"""The runner: order, one compilation, and errors that name the pass."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from quant2e.errors import PassError
from quant2e.graph.captured.capture import capture
from quant2e.graph.qdq_ops import qd
from quant2e.passes import Promise, run
from quant2e.passes.runner import checking


@dataclass(frozen=True)
class Replace:
    old: str
    new: str

    @property
    def __name__(self) -> str:
        return f"{self.old}_to_{self.new}"

    def __call__(self, gm: GraphModule) -> int:
        nodes = [n for n in gm.graph.nodes if n.target is getattr(torch.ops.aten, self.old).default]
        for node in nodes:
            node.target = getattr(torch.ops.aten, self.new).default
        return len(nodes)


def breaks(gm: GraphModule) -> int:
    raise KeyError("lost")


def unsorts(gm: GraphModule) -> int:
    *_, relu, output = gm.graph.nodes
    output.append(relu)
    return 1


def mixes_dtypes(gm: GraphModule) -> int:
    *_, relu, output = gm.graph.nodes
    return quantized_as(gm, relu, output, torch.int8, torch.uint8)


def quantized_as(gm, value, reader, written, read) -> int:
    """Quantize as one dtype and dequantize as another."""
    bounds = {torch.int8: (-128, 127), torch.uint8: (0, 255)}
    with gm.graph.inserting_before(reader):
        q = gm.graph.call_function(qd.quantize_per_tensor.default, (value, 0.1, 0, *bounds[written], written))
        dq = gm.graph.call_function(qd.dequantize_per_tensor.default, (q, 0.1, 0, *bounds[read], read))
    q.meta["val"] = value.meta["val"].to(written)
    reader.replace_input_with(value, dq)
    return 1


def captured() -> GraphModule:
    return capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.ones(1, 3))


def test_runs_in_order_counts_and_compiles_once(monkeypatch):
    gm, compiled, checked = captured(), [], []
    recompile = gm.recompile
    monkeypatch.setattr(gm, "recompile", lambda: (compiled.append(1), recompile())[1])
    passes = (Replace("relu", "tanh"), Replace("relu", "exp"), Replace("tanh", "neg"))
    with checking(lambda gm, promise: lambda: checked.append(list(gm.graph.nodes)[-2].target.name())):
        assert run(gm, passes) == {"relu_to_tanh": 1, "tanh_to_neg": 1}
    assert (len(compiled), checked) == (1, ["aten::tanh", "aten::neg"])
    assert "aten.neg.default" in gm.code
    assert run(gm, passes[:2]) == {}
    assert len(compiled) == 1


def test_what_a_pass_does_twice_is_added_up():
    gm = capture(nn.Sequential(nn.ReLU(), nn.Tanh(), nn.ReLU()), torch.ones(3))
    passes = (Replace("relu", "tanh"), Replace("tanh", "relu"), Replace("relu", "tanh"))
    assert run(gm, passes, promise=Promise(result=False)) == {"relu_to_tanh": 5, "tanh_to_relu": 3}


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (breaks, "pass 'breaks' failed: 'lost'"),
        (unsorts, "pass 'unsorts' left an illegal graph: "),
        (
            mixes_dtypes,
            "pass 'mixes_dtypes' left an illegal graph: a Q/DQ graph became illegal: .*a dequantize reads the dtype",
        ),
        (Replace("relu", "tanh"), "pass 'relu_to_tanh' left an illegal graph: the result changed: "),
    ],
)
def test_errors_name_the_pass(rewrite, message):
    with pytest.raises(PassError, match=message):
        run(captured(), (rewrite,))


def test_a_pipeline_that_says_that_numbers_change_may_change_them():
    run(captured(), (Replace("relu", "tanh"),), promise=Promise(result=False))
