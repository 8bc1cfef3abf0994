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

from quant2e.errors import AnnotationError


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """``name``: for people. ``saturates``: full-range u8 × s8 products may overflow on this machine."""

    name: str
    saturates: bool

    @classmethod
    def of(cls, target: InstructionSet | str | None) -> InstructionSet:
        """An instruction set by name, such as ``"avx512_vnni"``; this machine's for None.

        Raises `AnnotationError` for a name that is not one of `TARGETS`.
        """
        if isinstance(target, InstructionSet):
            return target
        if target is None:
            return detect()
        plain = str(target).lower().replace("-", "_").replace(" ", "_")
        if plain not in TARGETS:
            raise AnnotationError(
                f"isa={target!r} is not known: choose one of {', '.join(sorted(TARGETS))}, or describe the machine as "
                "InstructionSet(name, saturates=...)"
            )
        return TARGETS[plain]


TARGETS: Mapping[str, InstructionSet] = {
    "avx2": InstructionSet("AVX2", saturates=True),
    "avx2_vnni": InstructionSet("AVX2 VNNI", saturates=False),
    "avx512": InstructionSet("AVX512", saturates=True),
    "avx512_vnni": InstructionSet("AVX512 VNNI", saturates=False),
    "amx": InstructionSet("AMX", saturates=False),
}
"""Machines that can be named, to quantize for another one than this."""

# Limits of oneDNN under which its int8 kernels use no VNNI, whatever the CPU has.
_WITHOUT_VNNI = frozenset({"SSE41", "AVX", "AVX2", "AVX512_CORE"})
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def detect(environment: Mapping[str, str] | None = None) -> InstructionSet:
    """The instruction set that oneDNN's int8 kernels use on this machine.

    ``environment``: where a limit such as ``ONEDNN_MAX_CPU_ISA=AVX2`` is looked up; ``os.environ`` when None.
    """
    variables = os.environ if environment is None else environment
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return InstructionSet(platform.machine(), saturates=False)
    able = torch.cpu.get_capabilities()
    own = _own(able)
    limit = next((variables[name].upper() for name in _LIMITS if variables.get(name)), "")
    if limit.startswith("AVX2_VNNI"):
        # The CPU may have VNNI on its 512-bit registers only, which this limit forbids.
        return InstructionSet(f"{own.name} limited to {limit}", saturates=not able.get("avx_vnni", False))
    return InstructionSet(f"{own.name} limited to {limit}", saturates=True) if limit in _WITHOUT_VNNI else own


def _own(able: Mapping[str, object]) -> InstructionSet:
    kinds = {"amx_tile": "amx", "avx512_vnni": "avx512_vnni", "avx_vnni": "avx2_vnni", "avx512_f": "avx512"}
    return TARGETS[next((name for feature, name in kinds.items() if able.get(feature)), "avx2")]
