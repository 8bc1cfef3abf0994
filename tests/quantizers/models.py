"""Small models that the tests of the quantizers share, and how they are annotated."""

import torch
import torch.nn.functional as F
from torch import nn

from quant2e import capture
from quant2e.graph.captured.module import copy_graph
from quant2e.passes import run
from quant2e.passes.fold_batch_norm import fold_batch_norm
from quantizers import annotations_text


class Residual(nn.Module):
    """conv, bn, relu, a depthwise residual block, pooling, a classifier: the shape of a small CNN."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        y = self.point(F.relu6(self.depthwise(x)))
        y += x
        y = F.max_pool2d(self.relu(y), 2)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


class Attention(nn.Module):
    """Self-attention written out, with an additive mask made from integers."""

    def __init__(self, dim=8, heads=2):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm, self.heads = nn.LayerNorm(dim), heads

    def split(self, x):
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x, mask):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.5 + bias, dim=-1)
        mixed = torch.matmul(weights, v).transpose(1, 2).reshape(x.shape)
        return self.norm(x + self.out(mixed))


class Of(nn.Module):
    """A function of its inputs that uses the modules given by name."""

    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


IMAGE = (torch.randn(2, 3, 8, 8),)
TOKENS = (torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.int64))
ROWS = (torch.randn(4, 8),)


def captured(model, example, **kwargs):
    """The graph as prepare_pt2e gives it to a quantizer."""
    gm = copy_graph(capture(model.eval(), example, **kwargs))
    run(gm, (fold_batch_norm,))
    return gm


def annotated(model, example, quantizer, **kwargs):
    gm = captured(model, example, **kwargs)
    quantizer.transform_for_annotation(gm)
    quantizer.annotate(gm)
    quantizer.validate(gm)
    return gm


def annotations(model, example, quantizer, **kwargs) -> str:
    return annotations_text(annotated(model, example, quantizer, **kwargs))


def reasons(gm, quantizer) -> dict[str, str]:
    """Why each float op that has no annotation is left float."""
    told = {n.name: quantizer.reason(n) for n in gm.graph.nodes if n.op == "call_function"}
    return {name: text for name, text in told.items() if not text.startswith(("quantized by", "not a float op"))}
