import itertools
import time

import pytest
import torch
from torch import nn

import quant2e
from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation, QuantizationSpec
from quant2e.calibration.early_stopping import CALM_LOOKS, LOOK_EVERY
from quant2e.errors import CalibrationError
from quant2e.observers.measuring import MinMaxObserver, default_per_channel_weight_observer


class Inputs(Quantizer):
    def annotate(self, model):
        act = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine)
        weight = QuantizationSpec(
            torch.int8, default_per_channel_weight_observer, -127, 127, torch.per_channel_symmetric, ch_axis=0
        )
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                x, w = node.args[:2]
                node.meta[ANNOTATION] = QuantizationAnnotation(input_qspec_map={x: act, w: weight})
        return model

    def validate(self, model):
        pass


@pytest.fixture
def prepared():
    return quant2e.prepare_pt2e(quant2e.capture(nn.Linear(4, 4).eval(), (torch.ones(1, 4),)), Inputs())


def run(prepared, batches, **options):
    """How many batches were run."""
    seen = []
    quant2e.calibrate(prepared, batches, progress=lambda done, _: seen.append(done), **options)
    return seen[-1]


def test_without_asking_all_data_is_used(prepared):
    assert run(prepared, [torch.ones(1, 4)] * 100) == 100


def test_settled_ranges_end_it(prepared):
    assert run(prepared, itertools.repeat(torch.ones(1, 4)), range_tolerance=0.0) == LOOK_EVERY * (CALM_LOOKS + 1)


def test_growing_ranges_do_not(prepared):
    growing = [torch.full((1, 4), 1.05**i) for i in range(100)]
    assert run(prepared, growing, range_tolerance=0.01) == 100


def test_small_growth_is_tolerated(prepared):
    growing = (torch.full((1, 4), 1 + i * 1e-5) for i in itertools.count())
    assert run(prepared, growing, range_tolerance=0.01) == LOOK_EVERY * (CALM_LOOKS + 1)


def test_a_time_budget(prepared):
    start = time.monotonic()
    assert run(prepared, itertools.repeat(torch.ones(1, 4)), seconds=0.2) > 1
    assert 0.2 <= time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "seconds=0"),
        ({"range_tolerance": 1}, "range_tolerance=1"),
        ({"range_tolerance": -0.1}, "range_tolerance=-0.1"),
    ],
)
def test_wrong_options_are_refused(prepared, options, message):
    with pytest.raises(CalibrationError, match=message):
        quant2e.calibrate(prepared, [torch.ones(1, 4)], **options)
