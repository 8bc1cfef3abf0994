"""One architecture through everything: capture, two quantizers, files, and the targets."""

from __future__ import annotations

import re
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lowering
import quant2e
from lowering.verify import Verification
from quant2e.accuracy.output_error import output_sqnr
from quant2e.annotation.quantizer import Quantizer
from quant2e.report.report import FLOAT, WEIGHT_ONLY
from quantizers import X86InductorQuantizer, XNNPACKQuantizer
from tests.fuzz.run import bits_of, differences
from tests.zoo.architecture import CALIBRATION, HELD_OUT, Architecture
from tests.zoo.row import Lowered, Quantized, Row

QUANTIZERS: Mapping[str, Callable[[str], Quantizer]] = {
    "XNNPACK": lambda setting: XNNPACKQuantizer().set_global(setting),
    "x86": lambda setting: X86InductorQuantizer(isa="avx2").set_global(setting),
}
"""For one named processor, so that every machine writes the same rows; it is one without VNNI, the harder case."""

NO_NUMBERS_DB = -999.0

LONGEST = 200
"""Characters of a reason in a row."""


class Visit:
    """An architecture on its way. ``crashes``: what was raised that is no error of ours, by where."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.architecture, self.folder = architecture, folder
        self.model = architecture.model()
        self.data = [architecture.batch(seed) for seed in range(CALIBRATION)]
        self.held_out = [architecture.batch(100 + seed) for seed in range(HELD_OUT)]
        self.others = [architecture.batch(200 + s, other=True) for s in range(HELD_OUT)] if architecture.varying else []
        self.crashes: dict[str, str] = {}
        self.refused = ""

    @contextmanager
    def stage(self, where: str) -> Iterator[None]:
        """Keep the reason of a refusal; what is not an error of ours is a crash, and goes into the row as one."""
        self.refused = ""
        try:
            yield
        except quant2e.Quant2eError as error:
            self.refused = one_line(error)
        except Exception as error:  # noqa: BLE001 - a row says what was raised
            self.refused = f"{type(error).__name__}: {one_line(error)}"
            self.crashes[where] = "".join(traceback.format_exception(error)[-4:])[-1500:]

    def quantize(self, name: str) -> tuple[quant2e.QuantizedModel | None, Quantized]:
        """One quantizer; the result, and what the row says of it."""
        before, result, row = bits_of(self.model), None, Quantized()
        with self.stage(name):
            result = quant2e.quantize(
                self.model,
                self.data[0],
                QUANTIZERS[name](self.architecture.setting),
                self.data,
                dynamic_shapes=self.architecture.dynamic_shapes,
                min_sqnr_db=None,
            )
            row = self._judge(result)
        if bits_of(self.model) != before:
            self.crashes[f"{name}, purity"] = "the model's tensors were changed"
        return result, (Quantized(refused=self.refused) if self.refused else row)

    def _judge(self, result: quant2e.QuantizedModel) -> Quantized:
        work = [v for v in result.report.verdicts if v.op.macs]
        left = Counter(one_line(v.reason) for v in work if v.kind in (FLOAT, WEIGHT_ONLY))
        return Quantized(
            share=round(result.report.int8_mac_share, 4) if work else None,
            sqnr_db=_rounded(output_sqnr(self.model, result.module, map(self._call, self.held_out))),
            other_db=_rounded(output_sqnr(self.model, result.module, map(self._call, self.others)))
            if self.others
            else None,
            saved=self._saved(result),
            float_work=dict(left.most_common()),
        )

    @staticmethod
    def _call(batch: dict[str, Tensor]) -> quant2e.Call:
        return quant2e.Call((), batch)

    def _saved(self, result: quant2e.QuantizedModel) -> str:
        """What differs behind a file."""
        path = self.folder / f"{self.architecture.name}.pt2"
        result.save(path)
        again = quant2e.load(path)
        batches = [*self.held_out, *self.others]
        return differences(tensors(result.module, batches), tensors(again.module, batches)) or "same bits"

    def lower(self, target: str, result: quant2e.QuantizedModel | None) -> Lowered:
        """One target."""
        if (why := self.architecture.skips.get(target)) is not None:
            return Lowered(refused=f"not tried: {why}")
        if result is None:
            return Lowered(refused="not quantized")
        row = Lowered()
        with self.stage(target):
            row = TARGETS[target](result, self.folder / self.architecture.name)
        return Lowered(refused=self.refused) if self.refused else row


def _executorch(result: quant2e.QuantizedModel, path: Path) -> Lowered:
    report = lowering.to_executorch(result).report
    return Lowered(parts=len(report.partitions), kernels=len(report.leftovers), sqnr_db=_agreement(report.verification))


def _onnx(result: quant2e.QuantizedModel, path: Path) -> Lowered:
    report = lowering.to_onnx(result, path=path.with_suffix(".onnx")).report
    return Lowered(
        parts=sum((report.integer_kernels or {}).values()),
        kernels=len(report.float_products),
        sqnr_db=_agreement(report.verification),
    )


def _inductor(result: quant2e.QuantizedModel, path: Path) -> Lowered:
    torch._dynamo.reset()
    report = lowering.to_inductor(result, engines="native").report  # not measured: the same on every machine
    return Lowered(parts=len(report.int8), kernels=len(report.leftovers), sqnr_db=_agreement(report.verification))


TARGETS: Mapping[str, Callable[[quant2e.QuantizedModel, Path], Lowered]] = {
    "ExecuTorch": _executorch,
    "ONNX": _onnx,
    "Inductor": _inductor,
}


FROM: Mapping[str, str] = {"ExecuTorch": "XNNPACK", "ONNX": "x86", "Inductor": "x86"}
"""Whose graph each target gets."""


def _agreement(verification: Verification | None) -> float | None:
    assert verification is not None
    assert verification.passed
    return _rounded(verification.sqnr_db)


def _rounded(level: float) -> float | None:
    """None where bits are equal, and far below every floor where outputs are no numbers."""
    return None if level == float("inf") else round(max(level, NO_NUMBERS_DB), 1)


def one_line(reason: object) -> str:
    """A reason without lines, addresses and the folders of this machine, shortened."""
    words = re.sub(r"0x[0-9a-f]+|/tmp/\S+|/\S*/site-packages/", "…", " ".join(str(reason).split()))
    return words if len(words) <= LONGEST else words[: LONGEST - 2].rstrip() + " …"


def tensors(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    """What calls return, flat."""
    with torch.no_grad():
        return [[x for x in pytree.tree_leaves(model(**batch)) if isinstance(x, Tensor)] for batch in batches]


def targets_of(architecture: Architecture) -> tuple[str, ...]:
    """All of them, Inductor where that was asked for."""
    return tuple(target for target in TARGETS if target != "Inductor" or architecture.inductor)


def visit(architecture: Architecture, targets: Collection[str]) -> Row:
    """The row of an architecture. ``targets``: those that it is lowered to."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        going = Visit(architecture, Path(folder))
        results, quantizers = {}, {}
        for name in QUANTIZERS:
            results[name], quantizers[name] = going.quantize(name)
        lowered = {target: going.lower(target, results[FROM[target]]) for target in targets}
    return Row(
        name=architecture.name,
        family=architecture.family,
        parameters=sum(p.numel() for p in going.model.parameters()),
        varying=architecture.varying,
        quantizers=quantizers,
        targets=lowered,
        crashes=going.crashes,
    )


def wrong(architecture: Architecture, row: Row) -> Iterator[str]:
    """What no table excuses: crashes, files that compute other bits, and outputs below the floor."""
    yield from (f"{where} crashed: {text}" for where, text in row.crashes.items())
    for name, one in row.quantizers.items():
        if not one.refused and one.saved != "same bits":
            yield f"{name}: a file computes something else: {one.saved}"
        for level in (one.sqnr_db, one.other_db):
            if level is not None and level < architecture.floor_db:
                yield f"{name}: {level} dB, and the floor is {architecture.floor_db} dB"
