"""Where values come from, and which tensors hold masking values."""

import pytest
import torch
from torch import nn

from quantizers.kit.value_source import Source, ValueSources
from tests.quantizers.models import captured


class Model(nn.Module):
    """Computes ``function`` of a float, an integer and a boolean input, with a parameter, a table and buffers at
    hand.
    """

    def __init__(self, function):
        super().__init__()
        self.p, self.table = nn.Parameter(torch.ones(4)), nn.Embedding(8, 4)
        self.register_buffer("f", torch.ones(4))
        self.register_buffer("never", torch.full((4,), float("-inf")))
        self.register_buffer("order", torch.arange(4))
        self.function = function

    def forward(self, x, i, b):
        return self.function(self, x, i, b)


EXAMPLE = (torch.randn(2, 4), torch.randint(0, 8, (2, 4)), torch.ones(2, 4, dtype=torch.bool))


def of_result(function):
    gm = captured(Model(function), EXAMPLE)
    found = ValueSources(gm)
    (result,) = next(n for n in gm.graph.nodes if n.op == "output").all_input_nodes
    return found, result


@pytest.mark.parametrize(
    ("function", "source"),
    [
        (lambda m, x, i, b: x + 1, Source.DATA),
        (lambda m, x, i, b: x * i, Source.DATA),
        (lambda m, x, i, b: m.p * 2 + m.f, Source.PARAMETER),
        (lambda m, x, i, b: m.f * 2, Source.LITERAL),
        (lambda m, x, i, b: torch.arange(4).float() * m.f, Source.LITERAL),
        (lambda m, x, i, b: m.order * 2, Source.LITERAL),
        (lambda m, x, i, b: torch.rand(4), Source.DATA),
        # masks and positions
        (lambda m, x, i, b: (1.0 - i.float()) * torch.finfo(torch.float32).min, Source.INDEX),
        (lambda m, x, i, b: torch.where(b, 0.0, float("-inf")), Source.INDEX),
        (lambda m, x, i, b: torch.zeros(2, 4).masked_fill(b, -1e9), Source.INDEX),
        (lambda m, x, i, b: (i.float() * m.f).cos(), Source.INDEX),
        (lambda m, x, i, b: (x > 0).float(), Source.INDEX),
        (lambda m, x, i, b: i + 1, Source.INDEX),
        (lambda m, x, i, b: x.argmax(-1), Source.INDEX),
        # what an index picks is data
        (lambda m, x, i, b: m.table(i), Source.DATA),
        (lambda m, x, i, b: m.f[i % 4], Source.DATA),
        (lambda m, x, i, b: nn.functional.one_hot(i, 8).float() @ m.table.weight, Source.DATA),
        (lambda m, x, i, b: i.float() * m.p, Source.DATA),
        (lambda m, x, i, b: torch.fft.rfft(x).abs(), Source.DATA),
    ],
)
def test_source(function, source):
    found, result = of_result(function)
    assert found.source[result] == source


@pytest.mark.parametrize(
    ("function", "origin"),
    [
        (lambda m, x, i, b: x.masked_fill(b, float("-inf")), "masked_fill"),
        (lambda m, x, i, b: torch.where(b, x, -1e9), "where"),
        (lambda m, x, i, b: x + m.never, "never"),
        (lambda m, x, i, b: (x.masked_fill(b, -65504.0)[:, None] * 0.5).expand(2, 3, 4), "masked_fill"),
        (lambda m, x, i, b: x + torch.full((4,), -1e4), "full"),
        # wherever it is moved
        (lambda m, x, i, b: x.masked_fill(b, float("-inf")).swapaxes(0, 1), "masked_fill"),
        (lambda m, x, i, b: x.masked_fill(b, float("-inf")).broadcast_to(3, 2, 4), "masked_fill"),
        (lambda m, x, i, b: x.masked_fill(b, float("-inf")).unflatten(1, (2, 2)), "masked_fill"),
        (lambda m, x, i, b: x.masked_fill(b, float("-inf")).chunk(2, 1)[1], "masked_fill"),
        (lambda m, x, i, b: x.masked_fill(b, float("-inf"))[:, i[0, :2] % 4], "masked_fill"),
        (lambda m, x, i, b: torch.hstack([x, x.masked_fill(b, float("-inf"))]), "masked_fill"),
        # it ends where it is squashed
        (lambda m, x, i, b: x.masked_fill(b, float("-inf")).softmax(-1), None),
        (lambda m, x, i, b: x.masked_fill(b, 0.0), None),
        (lambda m, x, i, b: x.masked_fill(b, float("-inf")).topk(2)[0].sigmoid(), None),
        (lambda m, x, i, b: x * 1e6, None),
        (lambda m, x, i, b: x + m.f, None),
    ],
)
def test_masking_values(function, origin):
    found, result = of_result(function)
    assert (found.masking[result].name if result in found.masking else None) == origin
    assert (found.objection(result) is None) == (origin is None)
