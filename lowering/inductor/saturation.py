"""Where oneDNN's int8 kernels would overflow, and where it can be shown that they do not.

Without VNNI an x86 CPU multiplies u8 by s8 with ``vpmaddubsw``, which adds two neighbouring products into a signed
16-bit lane that saturates. A lane holds a₁·w₁ + a₂·w₂ with 0 ≤ a ≤ a_max, so no lane overflows when, for each output
channel, a_max times the two largest weights stays within 32767, and a_max times the two smallest above -32768.
Which weights meet in a lane depends on how oneDNN packs them; the bound holds for any packing.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import torch
from torch import Tensor

_WITHOUT_VNNI = frozenset({"SSE41", "AVX", "AVX2", "AVX512_CORE"})
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_LANE = torch.iinfo(torch.int16)


def adds_in_16_bits(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether int8 kernels on this machine go through the saturating 16-bit addition.

    ``environment``: where oneDNN's instruction set may be limited, as by ``ONEDNN_MAX_CPU_ISA=AVX2``.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    limit = next((environment[name].upper() for name in _LIMITS if environment.get(name)), "")
    if limit in _WITHOUT_VNNI:
        return True
    able = torch.cpu.get_capabilities()
    wide, narrow = able.get("avx512_vnni", False), able.get("avx_vnni", False)
    if limit.startswith("AVX2_VNNI"):
        return not narrow
    return not (wide or narrow)


def may_overflow(weight: Tensor, largest_activation: int) -> bool:
    """Whether two products may leave the 16-bit lane.

    ``weight``: int8, output channels first. ``largest_activation``: of unsigned 8-bit activations.
    """
    rows = weight.reshape(weight.shape[0], -1).to(torch.int32)
    if rows.numel() == 0:
        return False
    pair = min(2, rows.shape[1])
    largest = rows.clamp(min=0).topk(pair).values.sum(1).max()
    smallest = rows.clamp(max=0).topk(pair, largest=False).values.sum(1).min()
    return bool(largest * largest_activation > _LANE.max) or bool(smallest * largest_activation < _LANE.min)
