"""The form of a Q/DQ graph for ONNX runtimes: where its new nodes come from."""

import copy

import torch
from torch import nn

from lowering.onnx.qdq_form import CONVENTIONS, in_form
from quant2e import quantize
from quant2e.graph.edit import ORIGIN
from quantizers import XNNPACKQuantizer


class Twice(nn.Module):
    """A linear that is called twice, on rows in batches."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(torch.relu(self.linear(x)))


def test_every_new_node_has_an_origin():
    """Also those behind an s8 input, before an s8 output, and that read a weight which is transposed already."""
    torch.manual_seed(0)
    example = (torch.randn(2, 3, 8),)
    result = quantize(Twice().eval(), example, XNNPACKQuantizer().set_global("w8a8"), [example], int8_io=True)
    module = copy.deepcopy(result.module)
    before = {node.name for node in module.graph.nodes}
    in_form(module, CONVENTIONS["onnxruntime"])
    new = [node for node in module.graph.nodes if node.name not in before]
    reads = [node.target for node in new if node.op == "get_attr" and "weight_quantized" in str(node.target)]
    assert len(reads) == 2
    assert len(set(reads)) == 1
    assert [node.name for node in new if not node.meta.keys() & set(ORIGIN)] == []
