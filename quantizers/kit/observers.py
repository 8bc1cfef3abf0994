"""Default observers of the backends: histograms and extremes for calibration, fake-quantizers for training.

In training, activations and weights follow a moving average (constant 0.01), as in PT2E.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from quant2e.annotation.granularity import Granularity
from quant2e.observers.base import ObserverFactory
from quant2e.observers.dynamic_fake_quant import DynamicFakeQuantize
from quant2e.observers.fake_quant import FakeQuantize, FusedMovingAvgObsFakeQuantize
from quant2e.observers.measuring import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)
from quant2e.observers.per_group import PerGroupMinMaxObserver

TRAINED_AVERAGE = 0.01
"""How fast ranges follow in training."""

_EACH_BATCH = MovingAverageMinMaxObserver.with_args(averaging_constant=1)


def activation_observer(is_dynamic: bool, is_qat: bool) -> ObserverFactory:
    """The observer, or fake-quantizer, of an activation, per tensor."""
    if is_qat:
        return FakeQuantize.with_args(observer=_EACH_BATCH) if is_dynamic else FusedMovingAvgObsFakeQuantize.with_args()
    return PlaceholderObserver.with_args() if is_dynamic else HistogramObserver.with_args()


def with_scale_for_each(spec: Any, granularity: Granularity) -> Any:
    """A dynamic ``spec`` with a scale for each token or image; its observer becomes one that finds such scales.

    Integers are affine int8 in all of -128..127, the only ones that such scales are found for.
    """
    factory = getattr(spec.observer_or_fake_quant_ctr, "p", spec.observer_or_fake_quant_ctr)
    trains = hasattr(getattr(factory, "func", factory), "enable_fake_quant")
    observer = DynamicFakeQuantize if trains else PlaceholderObserver
    return replace(
        spec,
        observer_or_fake_quant_ctr=observer.with_args(granularity=granularity),
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
    )


def weight_observer(is_per_channel: bool, is_qat: bool) -> ObserverFactory:
    """The observer, or fake-quantizer, of the weight of a product."""
    if is_qat:
        averages = MovingAveragePerChannelMinMaxObserver if is_per_channel else MovingAverageMinMaxObserver
        return FusedMovingAvgObsFakeQuantize.with_args(observer=averages)
    return (PerChannelMinMaxObserver if is_per_channel else MinMaxObserver).with_args()


def group_observer(group_size: int, is_qat: bool) -> ObserverFactory:
    """The observer, or fake-quantizer, of a weight with a scale for each ``group_size`` neighbours in a row."""
    if is_qat:
        return FakeQuantize.with_args(
            observer=PerGroupMinMaxObserver, averaging_constant=TRAINED_AVERAGE, group_size=group_size
        )
    return PerGroupMinMaxObserver.with_args(group_size=group_size)


def table_observer(is_qat: bool) -> ObserverFactory:
    """The observer, or fake-quantizer, of an embedding table, per row. A rarely looked up row has no average."""
    if is_qat:
        return FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver.with_args(averaging_constant=1))
    return PerChannelMinMaxObserver.with_args()
