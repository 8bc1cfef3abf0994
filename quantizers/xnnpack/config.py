"""XNNPACK configurations: int8 activations per tensor, symmetric weights per tensor or channel."""

from __future__ import annotations

from functools import lru_cache

import torch

from quant2e.annotation.config import QuantizationConfig
from quant2e.annotation.specs import QuantizationSpec
from quantizers.kit.observers import activation_observer, group_observer, weight_observer

ACTIVATION_EPS = 2**-12
"""Smallest scale of a static activation: the delegate bounds the ratios of scales."""

DYNAMIC_EPS = torch.finfo(torch.float32).eps
"""Smallest scale of a dynamic activation."""

WEIGHT_EPS = 2**-16
"""Smallest scale of a weight. The delegate stores a bias as int32 with scale s_x·s_w ≥ 2⁻²⁸: |bias| < 8 always fits."""


@lru_cache
def get_symmetric_quantization_config(
    is_per_channel: bool = False,
    is_qat: bool = False,
    is_dynamic: bool = False,
    act_qmin: int = -128,
    act_qmax: int = 127,
    weight_qmin: int = -127,
    weight_qmax: int = 127,
    group_size: int | None = None,
) -> QuantizationConfig:
    """int8 activations (affine, per tensor) and int8 weights (symmetric, per tensor or per output channel).

    ``is_dynamic``: activations get their parameters at run time, and results stay float. Equal arguments give equal
    configs. ``is_qat``: the specs make fake-quantizers, for `quant2e.prepare_qat_pt2e`.
    ``weight_qmin=-8, weight_qmax=7`` is what XNNPACK stores in 4 bits, with ``is_dynamic`` only. ``group_size``: one
    scale for so many neighbours in a row of a weight, a multiple of 32; 4 bits unless bounds are given.
    """
    if group_size is not None:
        if (weight_qmin, weight_qmax) == (-127, 127):
            weight_qmin, weight_qmax = -8, 7
        observer = group_observer(group_size, is_qat).with_args(scale_dtype=torch.bfloat16, eps=WEIGHT_EPS)
    else:
        observer = weight_observer(is_per_channel, is_qat).with_args(eps=WEIGHT_EPS)
    per_channel = is_per_channel or group_size is not None
    activation = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=activation_observer(is_dynamic, is_qat).with_args(
            eps=DYNAMIC_EPS if is_dynamic else ACTIVATION_EPS
        ),
        quant_min=act_qmin,
        quant_max=act_qmax,
        qscheme=torch.per_tensor_affine,
        is_dynamic=is_dynamic,
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=observer,
        quant_min=weight_qmin,
        quant_max=weight_qmax,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if per_channel else None,
    )
    return QuantizationConfig(activation, None if is_dynamic else activation, weight, None, is_qat)
