"""ExecuTorch's own workflow on a file: torch loads it, and XNNPACK takes as much of it as of the graph itself."""

import pytest
import torch
from torch import nn

from quant2e import quantize
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

pytest.importorskip("executorch")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.last(self.norm(self.first(x).relu()))


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [True, False])
def test_as_many_ops_are_delegated(tmp_path, at_once):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge, to_edge_transform_and_lower

    torch.manual_seed(0)
    x = torch.randn(4, 8)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    model = quantize(Net().eval(), x, quantizer, [x])
    model.save(tmp_path / "net.pt2")

    def left(program):
        if at_once:
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        else:
            lowered = to_edge(program).to_backend(XnnpackPartitioner())
        return [str(n.target) for n in lowered.exported_program().graph.nodes if n.op == "call_function"]

    from_file = left(torch.export.load(tmp_path / "net.pt2"))
    assert "executorch_call_delegate" in from_file
    assert from_file == left(torch.export.export(model.module, (x,)))
