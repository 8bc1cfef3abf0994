"""Multiply-accumulates: every kind of product, against torch's count of the same call run op by op."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from quant2e import capture
from quant2e.report.float_ops import list_float_ops
from quant2e.report.macs import count_macs

aten = torch.ops.aten


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def rand(*sizes):
    return [torch.randn(size) for size in sizes]


CALLS = {
    "linear": (F.linear, rand((2, 3, 5), (4, 5), (4,))),
    "matmul": (torch.matmul, rand((2, 3, 5), (5, 4))),
    "bmm": (torch.bmm, rand((2, 3, 5), (2, 5, 4))),
    "addmm": (torch.addmm, rand((4,), (3, 5), (5, 4))),
    "baddbmm": (torch.baddbmm, rand((2, 3, 4), (2, 3, 5), (2, 5, 4))),
    "tensordot": (lambda x, y: torch.tensordot(x, y, dims=([0, 2], [1, 0])), rand((2, 3, 5), (5, 2, 4))),
    "chain": (torch.chain_matmul, rand((2, 3), (3, 5), (5, 4))),
    "einsum": (lambda x, y: torch.einsum("bti,ihd->bthd", x, y), rand((2, 3, 5), (5, 2, 4))),
    "conv1d": (F.conv1d, rand((2, 4, 9), (6, 4, 3))),
    "conv2d": (lambda x, w: F.conv2d(x, w, stride=2, padding=1, groups=2), rand((2, 4, 9, 7), (6, 2, 3, 3))),
    "conv2d, padded": (lambda x, w: F.conv2d(x, w, padding="same"), rand((2, 4, 9, 7), (6, 4, 3, 3))),
    "conv3d": (F.conv3d, rand((2, 4, 5, 6, 7), (6, 4, 3, 3, 3))),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w, stride=2), rand((2, 4, 5, 5), (4, 3, 3, 3))),
    "convolution": (
        lambda x, w: torch.convolution(x, w, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1),
        rand((2, 4, 5, 5), (4, 3, 3, 3)),
    ),
    "attention": (F.scaled_dot_product_attention, rand((2, 3, 7, 4), (2, 3, 5, 4), (2, 3, 5, 6))),
    "by keyword": (lambda x, y: aten.mm.default(self=x, mat2=y), rand((3, 5), (5, 4))),
    "lstm": (nn.LSTM(5, 4, 2, bidirectional=True), rand((7, 2, 5))),
    "lstm, projected": (nn.LSTM(5, 6, proj_size=3, batch_first=True), rand((2, 7, 5))),
    "gru": (nn.GRU(5, 4, bias=False), rand((7, 2, 5))),
    "rnn": (nn.RNN(5, 4, nonlinearity="relu"), rand((7, 5))),
    "lstm cell": (nn.LSTMCell(5, 4), rand((2, 5))),
    "gru cell": (nn.GRUCell(5, 4), rand((2, 5))),
    "rnn cell": (nn.RNNCell(5, 4), rand((2, 5))),
}


@pytest.mark.filterwarnings("ignore:.*_flat_weights:UserWarning", "ignore:.*chain_matmul:UserWarning")
@pytest.mark.filterwarnings("ignore:TF32:UserWarning")
@pytest.mark.parametrize("name", CALLS)
def test_as_torch_counts(name):
    function, inputs = CALLS[name]
    model = function if isinstance(function, nn.Module) else Of(function)
    flops = FlopCounterMode(display=False)
    # Fused kernels of layers and attentions count nothing there.
    with flops, torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    graph = capture(model, tuple(inputs))
    assert sum(op.macs for op in list_float_ops(graph)) == flops.get_total_flops() / 2 > 0


BY_HAND = {
    "matmul of a vector": (torch.matmul, rand((2, 3, 5), (5,)), 30),
    "mv": (torch.mv, rand((3, 5), (5,)), 15),
    "dot": (torch.dot, rand((5,), (5,)), 5),
    "inner": (torch.inner, rand((3, 5), (4, 5)), 60),
    "addmv": (torch.addmv, rand((3,), (3, 5), (5,)), 15),
    "addbmm": (torch.addbmm, rand((3, 4), (2, 3, 5), (2, 5, 4)), 2 * 3 * 5 * 4),
    "bilinear": (F.bilinear, rand((2, 3), (2, 5), (4, 3, 5)), 2 * 4 * (3 * 5 + 5)),
    "conv_tbc": (torch.conv_tbc, rand((7, 2, 5), (3, 5, 4), (4,)), 5 * 2 * 4 * 3 * 5),
    "no product": (torch.add, rand((3, 5), (3, 5)), 0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    function, inputs, macs = BY_HAND[name]
    graph = capture(Of(function), tuple(inputs))
    assert [op.macs for op in list_float_ops(graph)] == [macs]


def test_packed_sequences_count_their_steps():
    graph = torch.fx.Graph()

    def value(name, *sizes):
        node = graph.placeholder(name)
        node.meta["val"] = torch.empty(sizes)
        return node

    weights = [value("w_ih", 12, 5), value("w_hh", 12, 4), value("b_ih", 12), value("b_hh", 12)]
    packed = (value("data", 6, 5), value("sizes", 3), value("h", 1, 3, 4), weights, True, 1, 0.0, False, False)
    node = graph.call_function(aten.gru.data, packed)
    node.meta["val"] = (torch.empty(6, 4), torch.empty(1, 3, 4))
    assert count_macs(node) == 6 * 12 * (5 + 4)
