"""What is written in place stays what it was, whatever is rewritten around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lowering.inductor.pipeline import Rewritten
from quant2e.graph.qdq_ops import qd
from tests.lowering.graphs import Weight, on_grid

X = (0.02, -5)


class Net(nn.Module):
    """``body`` of an int8 convolution, an int8 linear layer and ``x``."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel, self.matrix = Weight(torch.randn(4, 4, 3, 3)), Weight(torch.randn(8, 100))
        self.body = body

    def convolved(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), padding=1)

    def multiplied(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix())

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def a_part(net: Net, x: Tensor) -> Tensor:
    y = on_grid(x, X)
    y[:, :2].mul_(0.5)
    return net.multiplied(y.flatten(1))


def behind_an_older_view(net: Net, x: Tensor) -> Tensor:
    y = on_grid(x, X)
    older = y.view(2, -1)
    y.mul_(0.5)
    return net.multiplied(older)


def between_two_readers(net: Net, x: Tensor) -> Any:
    y = on_grid(x, X)
    first = net.convolved(y)
    y.flatten(1).relu_()
    return first, net.convolved(y)


def integers(net: Net, x: Tensor) -> Any:
    q = qd.quantize_per_tensor.default(x, *X, -128, 127, torch.int8)
    q[:, 0].add_(1)
    return q, net.convolved(qd.dequantize_per_tensor.default(q, *X, -128, 127, torch.int8))


@pytest.mark.parametrize("body", [a_part, behind_an_older_view, between_two_readers, integers])
def test_a_write_through_a_view_is_kept(body):
    x, net = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)), Net(body)
    rewritten = Rewritten(torch.export.export(net, (x,)).module(), "float").graph
    rewritten.recompile()
    with torch.no_grad():
        found, wanted = rewritten(x.clone()), pytree.tree_leaves(net(x.clone()))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-5)
