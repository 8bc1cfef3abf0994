"""Constants with fewer dimensions than what they meet, where a kernel of ExecuTorch computes: any batch, also one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lowering
import quant2e
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config


class Columns(nn.Module):
    """Each column of a table by a vector of its own, as tabular transformers begin."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.shift = nn.Parameter(torch.randn(6, 16)), nn.Parameter(torch.randn(6, 16))
        self.linear = nn.Linear(16, 4)

    def forward(self, columns: Tensor) -> Tensor:
        y: Tensor = self.linear(columns.unsqueeze(-1) * self.scale + self.shift)
        return y


def test_a_batch_of_one_and_of_many_give_what_the_graph_gives():
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    result = quant2e.quantize(Columns().eval(), (x,), quantizer, [(x,)], dynamic_batch=8, progress=False)
    program = lowering.to_executorch(result)
    step = (result(x).max() - result(x).min()) / 255
    for batch in (1, 2, 5):
        assert (program(x[:batch]) - result(x[:batch])).abs().max() < 2 * step
