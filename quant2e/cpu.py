"""Instruction sets of a CPU, and the bound under which their u8 × s8 products are exact.

    -32768 <= a · w₁ + a · w₂ <= 32767        for the two largest weights of a channel, and for the two smallest

Without VNNI or AMX an x86 CPU adds two neighbouring products into a *saturating* 16-bit lane (``vpmaddubsw``). Products
of full-range operands overflow it: 2·255·128 > 32767. With activations in 0..127 they cannot: 2·127·128 = 32512. A lane
holds a₁·w₁ + a₂·w₂ with 0 <= a₁, a₂ <= a; which weights meet in one depends on how a kernel packs them, and the bound
holds for any packing. It holds for any zero point as well: oneDNN multiplies the stored integers and corrects for the
zero point afterwards, in 32 bits.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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


LANE = torch.iinfo(torch.int16)
"""What the sum of two products must fit."""


def extreme_weights(rows: Tensor) -> Tensor:
    """The two largest numbers of each row, at least 0, and the two smallest, at most 0: ``[rows, 4]``.

    ``rows``: ``[rows, n]``, one row per output channel. Zeros stand where a row has fewer than two numbers.
    """
    most = min(2, rows.shape[1])
    largest, smallest = rows.topk(most).values.clamp(min=0), rows.topk(most, largest=False).values.clamp(max=0)
    missing = (0, 2 - most)
    return torch.cat([torch.nn.functional.pad(pair, missing) for pair in (largest, smallest)], 1)


def pair_sums(extremes: Tensor) -> Tensor:
    """Largest and smallest sum of two weights of each channel, ``[channels, 2]``, from what `extreme_weights` gives."""
    return torch.sum(extremes.unflatten(1, (2, 2)), 2)


def pairs_fit(extremes: Tensor, largest_activation: int) -> Tensor:
    """Whether the products of no two integer weights of a channel leave a 16-bit lane, ``[channels]``.

    ``extremes``: as `extreme_weights` gives them. ``largest_activation``: of unsigned 8-bit activations.
    """
    largest, smallest = (pair_sums(extremes) * largest_activation).unbind(1)
    return (largest <= LANE.max) & (smallest >= LANE.min)


def may_overflow(weight: Tensor, largest_activation: int) -> bool:
    """Whether two products of any output channel may leave the 16-bit lane.

    ``weight``: int8, output channels first. ``largest_activation``: of unsigned 8-bit activations.
    """
    if weight.numel() == 0:
        return False
    rows = weight.reshape(weight.shape[0], -1).to(torch.int32)
    return not bool(pairs_fit(extreme_weights(rows), largest_activation).all())
