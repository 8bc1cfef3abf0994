"""Schemes: a target with the form of weights and activations; a quantizer of ours, and the one of its own library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.accuracy.row import ALIKE, MENDED, PLAIN, REDUCED
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """What makes the quantizer of each method; None: the method has none for this scheme.

    ``ours``: ours for this machine, which quantizes embedding tables as well; ``alike``: ours with full ranges, for
    machines that multiply them exactly, and without tables, as peers do it; ``peer``: the target's own, for torchao and
    NNCF; ``reduced``: the same with the ranges that it has for this machine.
    """

    ours: Callable[[], Any]
    peer: Callable[[], Any] | None = None
    alike: Callable[[], Any] | None = None
    reduced: Callable[[], Any] | None = None

    def of(self, method: str) -> Callable[[], Any] | None:
        """What makes the quantizer of one of `METHODS`."""
        return {PLAIN: self.ours, MENDED: self.ours, ALIKE: self.alike, REDUCED: self.reduced}.get(method, self.peer)


def _xnnpack() -> Any:
    config = get_symmetric_quantization_config(is_per_channel=True)
    return ComposableQuantizer([EmbeddingQuantizer(), XNNPACKQuantizer().set_global(config)])


def _xnnpack_of_executorch() -> Any:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as theirs

    config = theirs.get_symmetric_quantization_config(is_per_channel=True)
    return theirs.XNNPACKQuantizer().set_global(config)


def _x86() -> Any:
    config = get_default_x86_inductor_quantization_config()
    return ComposableQuantizer([EmbeddingQuantizer(), X86InductorQuantizer().set_global(config)])


def _x86_alike() -> Any:
    return X86InductorQuantizer("avx512_vnni").set_global(get_default_x86_inductor_quantization_config())


def _x86_of_torchao(*, reduce_range: bool = False) -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as theirs

    config = theirs.get_default_x86_inductor_quantization_config(reduce_range=reduce_range)
    return theirs.X86InductorQuantizer().set_global(config)


XNNPACK, X86 = "XNNPACK w8a8", "x86 w8a8"
W4, W4_ASYMMETRIC = "w4 in groups of 32", "w4 in groups of 32, asymmetric"

SCHEMES: Mapping[str, Scheme] = {
    XNNPACK: Scheme(_xnnpack, _xnnpack_of_executorch),
    X86: Scheme(_x86, _x86_of_torchao, _x86_alike, partial(_x86_of_torchao, reduce_range=True)),
    W4: Scheme(lambda: X86InductorQuantizer().set_global("w4-g32-sym")),
    W4_ASYMMETRIC: Scheme(lambda: X86InductorQuantizer().set_global("w4-g32-asym")),
}
"""By name. Ours quantize embedding tables as well, which costs a little accuracy and no multiply-accumulate."""
