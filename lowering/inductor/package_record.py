"""Record of a package, as it is made: what the program takes, and what it was compiled from, with what and for what."""

from __future__ import annotations

import sys

import torch
from torch import SymInt, Tensor

from lowering.inductor.report import InductorReport
from lowering.inductor.source import InductorSource
from quant2e import __version__
from quant2e.cpu import detect
from quant2e.graph.captured.dynamic_shapes import bounds_of
from quant2e.report.plain_data import plain_data
from quant2e.storage.inductor_package import PackageInput, PackageRecord
from quant2e.versions import TORCH_VERSION

_UNBOUNDED = (1 << 62) - 1


def record_of_package(source: InductorSource, report: InductorReport) -> PackageRecord:
    """What a package says of itself, for `quant2e inspect` and whoever opens the file."""
    inputs = [
        PackageInput(
            name=spec.name,
            dtype=spec.value.dtype,
            sizes=tuple(_bounds(size) for size in spec.value.shape),
            channels_last=spec.memory_format is torch.channels_last,
        )
        for spec in source.signature.inputs
        if isinstance(spec.value, Tensor)
    ]
    verification = None if report.verification is None else report.verification.as_dict()
    return PackageRecord(
        versions={"quant2e": __version__, "torch": TORCH_VERSION, "python": sys.version.split()[0]},
        instructions=detect().name,
        inputs=tuple(inputs),
        report=source.report,
        encodings=source.encodings,
        lowering={
            "headline": report.headline,
            "ops": [
                {"name": op.name, "target": op.target, "kernel": op.kernel, "reason": op.reason, "post_op": op.post_op}
                for op in report.ops
            ],
            "notes": list(report.notes),
            "verification": plain_data(verification),
        },
    )


def _bounds(size: int | SymInt) -> tuple[int, int]:
    if not isinstance(size, SymInt):
        return int(size), int(size)
    low, high = bounds_of(size, {})
    return low, _UNBOUNDED if high is None else high
