"""Default fake-quantizers of PT2E, under its names, as factories (call one, or give it to a spec)."""

from __future__ import annotations

import torch

from quant2e.observers.fake_quant import FakeQuantize, FixedQParamsFakeQuantize, FusedMovingAvgObsFakeQuantize
from quant2e.observers.measuring import (
    FixedQParamsObserver,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)

_WEIGHT = FakeQuantize.with_args(
    quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, reduce_range=False
)
_FUSED_WEIGHT = FusedMovingAvgObsFakeQuantize.with_args(
    quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
)
_CHANNELS = {"observer": MovingAveragePerChannelMinMaxObserver, "qscheme": torch.per_channel_symmetric}
_NARROW = {"quant_min": -127, "eps": 2**-12}
_TABLE = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=torch.per_channel_affine_float_qparams,
    ch_axis=0,
    averaging_constant=1,
)

default_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=0,
    quant_max=255,
    dtype=torch.quint8,
    qscheme=torch.per_tensor_affine,
    reduce_range=True,
)
"""Activations, in 7 bits."""

default_histogram_fake_quant = default_fake_quant.with_args(observer=HistogramObserver)
default_weight_fake_quant = _WEIGHT
default_per_channel_weight_fake_quant = _WEIGHT.with_args(**_CHANNELS, ch_axis=0)

default_dynamic_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=0,
    quant_max=255,
    is_dynamic=True,
    dtype=torch.quint8,
    averaging_constant=1,
)
"""Activations whose parameters are found at run time: in training, those of each batch."""

default_embedding_fake_quant = _TABLE.with_args(dtype=torch.quint8, quant_min=0, quant_max=255)
default_embedding_fake_quant_4bit = _TABLE.with_args(dtype=torch.quint4x2)

default_fixed_qparams_range_neg1to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=FixedQParamsObserver.with_args(
        scale=2.0 / 256.0, zero_point=128, dtype=torch.quint8, quant_min=0, quant_max=255
    )
)
"""What lies in -1..1, as the result of tanh."""

default_fixed_qparams_range_0to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=FixedQParamsObserver.with_args(
        scale=1.0 / 256.0, zero_point=0, dtype=torch.quint8, quant_min=0, quant_max=255
    )
)
"""What lies in 0..1, as the result of sigmoid."""

default_fused_act_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(quant_min=0, quant_max=255, dtype=torch.quint8)
default_fused_wt_fake_quant = _FUSED_WEIGHT
default_fused_per_channel_wt_fake_quant = _FUSED_WEIGHT.with_args(**_CHANNELS)
fused_wt_fake_quant_range_neg_127_to_127 = _FUSED_WEIGHT.with_args(**_NARROW)
fused_per_channel_wt_fake_quant_range_neg_127_to_127 = _FUSED_WEIGHT.with_args(**_CHANNELS, **_NARROW)
