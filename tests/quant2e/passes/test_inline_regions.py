"""Inlining of grad-mode and disabled-autocast regions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.inline_regions import inline_regions
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.control_flow import bodies
from quant2e.passes import run


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            pass
        with torch.autocast("cpu", enabled=False):
            y = self.linear(x)
            with torch.no_grad():
                y, z = y.split(2, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            w = self.linear(x)
            with torch.autocast("cpu", enabled=False):
                w = self.linear(w.float())
        with torch.no_grad():
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (y @ z.t(),)), w


def test_what_computes_in_another_dtype_stays(golden):
    x, model = torch.randn(3, 4), Regions()
    program = torch.export.export(model, (x,))
    gm = copy_graph(program.module(check_guards=False))
    assert run(gm, (inline_regions,))
    golden("passes/inline_regions", gm.code + "".join(f"# {n.name}: {n.target}\n" for n in gm.graph.nodes if bodies(n)))
    for ours, theirs in zip(gm(x), model(x), strict=True):
        assert torch.equal(ours, theirs)
    assert not run(gm, (inline_regions,))


def test_a_graph_without_regions_is_not_rebuilt():
    gm = capture(nn.Linear(4, 4), torch.randn(3, 4))
    graph = gm.graph
    assert not inline_regions(gm)
    assert gm.graph is graph


def test_an_input_written_inside_a_region_is_written():
    class Writes(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_() + 1

    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(capture(Writes(), x.clone())(x), torch.tensor([1.0, 3.0]))
    assert torch.equal(x, torch.tensor([0.0, 2.0]))
