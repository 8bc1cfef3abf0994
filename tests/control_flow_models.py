"""Small models with control flow, and data for them, that tests of the core and of the lowerings share."""

from functools import cache

import torch
from torch import nn
from torch._higher_order_ops import scan, while_loop
from torch._higher_order_ops.map import map as map_op

import quant2e
from quant2e.graph.captured.module import copy_graph
from quantizers.xnnpack.quantizer import XNNPACKQuantizer


class Branches(nn.Module):
    """A branch on the data; its ``threshold`` is between the sums of what `data` makes."""

    def __init__(self, threshold=0.0):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.threshold = threshold

    def forward(self, x):
        wanted = x.sum() > self.threshold
        y = torch.cond(wanted, lambda y: self.second(y).relu(), lambda y: self.third(y) - 1.0, (self.first(x),))
        return y * 2


class Loop(nn.Module):
    """Three steps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x):
        return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, self.first(x).tanh()), (torch.tensor(0), x))[1]


class Recurrent(nn.Module):
    """A recurrent net over the first dimension."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        def step(h, x):
            h = torch.tanh(self.a(x) + self.b(h))
            return h, h.clone()

        return scan(step, x.new_zeros(x.shape[1], 8), x)[1]


class Mapped(nn.Module):
    """One layer for each row."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        return map_op(lambda row: self.a(row).relu(), x)


class Nested(nn.Module):
    """A branch in each step of a loop, with a norm to fold, and an op in place that nobody sees."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x):
        def step(i, x):
            y = torch.cond(x.sum() > 0, self.a, lambda x: self.norm(self.c(x)), (x,))
            return i + 1, torch.nn.functional.relu(self.b(y), inplace=True) - 0.3

        return while_loop(lambda i, x: i < 3, step, (torch.tensor(0), x))[1]


SHAPES = {Branches: (4, 8), Loop: (4, 8), Recurrent: (5, 2, 8), Mapped: (5, 2, 8), Nested: (2, 4, 8)}


def model(kind, *args):
    """A model in evaluation mode, the same in every test."""
    torch.manual_seed(0)
    return kind(*args).eval()


def data(kind, count=32):
    """Batches for it; every other one has a positive sum."""
    batches = (torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(seed)) for seed in range(count))
    return [(x + (0.5 if i % 2 else -0.5),) for i, x in enumerate(batches)]


@cache
def _captured(kind, *args):
    return quant2e.capture(model(kind, *args), data(kind, 1)[0])


def captured(kind, *args):
    """Its graph, a copy of its own: tracing control flow takes more than a second."""
    return copy_graph(_captured(kind, *args))


def prepared(kind, quantizer=None, *args):
    """Prepared for XNNPACK, unless told otherwise, and calibrated."""
    graph = quant2e.prepare_pt2e(captured(kind, *args), quantizer or XNNPACKQuantizer().set_global("w8a8"))
    return quant2e.calibrate(graph, data(kind))
