"""Functions of the user in a search: what they do to a model is nobody else's, and their failures are told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from quant2e.accuracy.tuning.space.evaluation import latency_of
from quant2e.errors import Quant2eError
from quantizers import XNNPACKQuantizer


def tuned(evaluate, **limits):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), [torch.randn(8, 8)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantizer = XNNPACKQuantizer().set_global("w8a8")
    result = quant2e.tune(model, (data[0],), quantizer, data, evaluate, relative=False, progress=False, **limits)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    return result


@pytest.mark.parametrize("spoil", ["cast", "write"])
def test_evaluate_may_do_to_a_model_what_it_likes(spoil):
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))

    def evaluate(module):
        found = -float(module(x).square().mean())
        if spoil == "cast":
            module.double()
        else:
            for weight in module.parameters():
                weight.zero_()
        return found

    result = tuned(evaluate, max_drop=0.0, higher_is_better=True)
    assert evaluate(result.model.module) == result.metric
    assert result.float_metric != 0.0


def test_a_latency_that_is_no_number_is_told():
    result = tuned(lambda _: 1.0, max_drop=0.1, latency=lambda _: None)
    assert "1 of 1 trials failed: latency returned None: return seconds" in str(result)
    for bad in (float("nan"), -1.0, "soon"):
        with pytest.raises(Quant2eError, match="return seconds of one call"):
            latency_of(lambda _, bad=bad: bad, None)
