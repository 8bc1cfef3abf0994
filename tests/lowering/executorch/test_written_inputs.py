"""A model that writes to its input: found by the fuzzer, refused with what to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowering
import quant2e
from quant2e.errors import LoweringError
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config


class Doubles(nn.Module):
    """Twice its input, in place; or of a copy."""

    def __init__(self, *, copies: bool) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone() if self.copies else x
        return x.add_(x)


def lowered(model: nn.Module) -> lowering.ExecuTorchProgram:
    x = torch.randn(3, 2, 4, 11)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    data = [(x.clone(),)]
    result = quant2e.quantize(model, (x.clone(),), quantizer, data, progress=False, allow_unquantized=True)
    return lowering.to_executorch(result)


def test_it_is_refused_by_name_and_says_what_to_do():
    with pytest.raises(LoweringError, match=r"writes to its input 'x'.*x = x\.clone\(\)"):
        lowered(Doubles(copies=False))


def test_a_copy_may_be_written_to():
    x = torch.ones(3, 2, 4, 11)
    assert torch.allclose(lowered(Doubles(copies=True))(x), torch.full_like(x, 2.0), atol=0.1)
    assert torch.equal(x, torch.ones_like(x))
