"""The runner: order, one compilation, and errors that name the pass."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from quant2e.errors import PassError
from quant2e.graph.capture import capture
from quant2e.passes import run


@dataclass(frozen=True)
class Replace:
    old: str
    new: str

    def __call__(self, gm: GraphModule) -> bool:
        nodes = [n for n in gm.graph.nodes if n.target is getattr(torch.ops.aten, self.old).default]
        for node in nodes:
            node.target = getattr(torch.ops.aten, self.new).default
        return bool(nodes)


def breaks(gm: GraphModule) -> bool:
    raise KeyError("lost")


def unsorts(gm: GraphModule) -> bool:
    *_, relu, output = gm.graph.nodes
    output.append(relu)
    return True


def captured() -> GraphModule:
    return capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.ones(1, 3))


def test_runs_in_order_and_compiles_once(monkeypatch):
    gm, compiled, verified = captured(), [], []
    recompile = gm.recompile
    monkeypatch.setattr(gm, "recompile", lambda: (compiled.append(1), recompile())[1])
    passes = (Replace("relu", "tanh"), Replace("relu", "exp"), Replace("tanh", "neg"))
    assert run(gm, passes, verify=lambda gm: verified.append(list(gm.graph.nodes)[-2].name))
    assert (len(compiled), verified) == (1, ["relu", "relu"])
    assert "aten.neg.default" in gm.code
    assert not run(gm, passes[:2])
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("rewrite", "verify", "message"),
    [
        (breaks, None, "pass 'breaks' failed: 'lost'"),
        (unsorts, None, "pass 'unsorts' left an illegal graph: "),
        (Replace("relu", "tanh"), breaks, r"pass 'Replace\(old='relu', new='tanh'\)' left an illegal graph: 'lost'"),
    ],
)
def test_errors_name_the_pass(rewrite, verify, message):
    with pytest.raises(PassError, match=message):
        run(captured(), (rewrite,), verify=verify)
