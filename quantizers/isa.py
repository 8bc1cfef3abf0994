"""What the machine's 8-bit multiply-add can hold.

Without VNNI or AMX an x86 CPU adds two u8 × s8 products into a *saturating* 16-bit lane (``vpmaddubsw``). Products of
full-range operands overflow it: 2·255·128 > 32767. With activations in 0..127 they cannot: 2·127·128 = 32512.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Limits of oneDNN under which its int8 kernels saturate. AVX2_VNNI is among them because a CPU may have VNNI on 512-bit
# registers only, and torch does not say.
_SATURATING = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE"})
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """``name``: for people. ``saturates``: full-range u8 × s8 products may overflow on this machine."""

    name: str
    saturates: bool


def detect(environment: Mapping[str, str] | None = None) -> InstructionSet:
    """The instruction set that oneDNN's int8 kernels use on this machine.

    ``environment``: where a limit such as ``ONEDNN_MAX_CPU_ISA=AVX2`` is looked up; ``os.environ`` when None.
    """
    variables = os.environ if environment is None else environment
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return InstructionSet(platform.machine(), saturates=False)
    own = _own()
    limit = next((variables[name].upper() for name in _LIMITS if variables.get(name)), "")
    return InstructionSet(f"{own.name} limited to {limit}", saturates=True) if limit in _SATURATING else own


def _own() -> InstructionSet:
    if torch.cpu._is_amx_tile_supported():
        return InstructionSet("AMX", saturates=False)
    if torch.cpu._is_vnni_supported():
        return InstructionSet("AVX512 VNNI", saturates=False)
    return InstructionSet("AVX512" if torch.cpu._is_avx512_supported() else "AVX2", saturates=True)
