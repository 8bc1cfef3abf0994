"""OpenVINOProgram: a model of OpenVINO, what of it runs on integers, and how it compares with its graph."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lowering.openvino.files import write_pair
from lowering.openvino.precision import RunOp, integer_kernels_of
from lowering.openvino.session import Session, read_model
from lowering.program import LoweredProgram, LoweringReport, Table
from lowering.signature import Signature
from lowering.verify import Verification
from quant2e.errors import LoweringError

SATURATES = (
    "on x86 without VNNI, OpenVINO's u8 × s8 kernels add two products in 16 bits, and saturate: quantize with "
    "OpenVINOQuantizer, which chooses ranges with which none does, for the processor at hand or for isa=…"
)
PRECISION = (
    "our own runs set INFERENCE_PRECISION_HINT to f32: on processors with bfloat16, OpenVINO computes float ops in "
    "that otherwise"
)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class OpenVINOReport(LoweringReport):
    """What an OpenVINO model holds and what OpenVINO runs of it on integers, on this machine.

    ``version``: of OpenVINO; ``size``: bytes of both files; ``constants``: bytes of its constants by dtype; ``ops``:
    the quantized ops with what runs them; ``notes``: what to know. ``ops`` and ``verification`` are None where nothing
    was run.
    """

    version: str
    size: int
    constants: Mapping[str, int]
    ops: tuple[RunOp, ...] | None = None
    notes: tuple[str, ...] = ()
    verification: Verification | None = None

    @property
    def integer_kernels(self) -> dict[str, int]:
        """How many quantized ops run as which kernel on integers."""
        return integer_kernels_of(self.ops or ())

    @property
    def in_float(self) -> tuple[RunOp, ...]:
        """The quantized ops that compute in float, each with its ``reason``."""
        return tuple(op for op in self.ops or () if op.reason)

    @property
    def compressed(self) -> tuple[RunOp, ...]:
        """Products in float whose weights are read as the integers that they are stored as."""
        return tuple(op for op in self.ops or () if op.weights)

    @property
    def headline(self) -> str:
        held = ", ".join(f"{size:,} {name}" for name, size in sorted(self.constants.items(), key=lambda item: -item[1]))
        ran = ""
        if self.ops is not None:
            count = sum(op.on_integers for op in self.ops)
            ran = f"; {count} of {len(self.ops)} quantized ops run on integers"
            if kinds := Counter(op.weights for op in self.compressed):
                ran += ", " + ", ".join(f"{n} read {name} weights" for name, n in kinds.items())
        return f"OpenVINO {self.version}: {self.size:,} bytes; constants: {held} bytes{ran}"

    def table(self) -> Table:
        rows = [(op.name, op.layer, op.kernel, op.precision, _computes(op)) for op in self.ops or ()]
        return ("op", "OpenVINO's layer", "kernel", "precision", "computes"), rows

    def __str__(self) -> str:
        lines = [self.headline]
        if self.ops is not None:
            kernels = ", ".join(f"{count} {name}" for name, count in sorted(self.integer_kernels.items()))
            lines.append(f"OpenVINO runs on integers: {kernels or 'nothing'}")
        lines += [f"{op.name}: {_computes(op)}" for op in (*self.compressed, *self.in_float)]
        lines += [f"note: {note}" for note in self.notes]
        if self.verification is not None:
            lines.append(f"against its Q/DQ graph: {self.verification}")
        return "\n".join(lines)


def _computes(op: RunOp) -> str:
    if op.weights:
        return f"in float, reads {op.weights} weights"
    return f"in float: {op.reason}" if op.reason else "on integers"


class OpenVINOProgram(LoweredProgram[OpenVINOReport]):
    """A model of OpenVINO. ``xml``, ``weights``: the bytes of its two files.

    Calling it runs it on the CPU: it takes and returns what the model takes and returns.
    """

    def __init__(self, xml: bytes, weights: bytes, report: OpenVINOReport, signature: Signature) -> None:
        self.xml = xml
        self.weights = weights
        self._report = report
        self._signature = signature
        self._session: Session | None = None

    @property
    def report(self) -> OpenVINOReport:
        return self._report

    @property
    def compiled(self) -> Any:
        """The ``openvino.CompiledModel`` that runs here. Raises `LoweringError` where OpenVINO cannot compile it."""
        return self._opened().compiled

    def _opened(self) -> Session:
        if self._session is None:
            self._session = Session(read_model(self.xml, self.weights, "this model"), "this model")
        return self._session

    def with_report(self, report: OpenVINOReport) -> OpenVINOProgram:
        """The same program with another report."""
        made = OpenVINOProgram(self.xml, self.weights, report, self._signature)
        made._session = self._session
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on positional inputs and inputs by name, in any order. Raises `LoweringError` on other inputs."""
        flat = self._signature.plain(args, kwargs)
        given = {
            spec.name: value
            for spec, value in zip(self._signature.inputs, flat, strict=True)
            if isinstance(value, Tensor)
        }
        session = self._opened()
        wanted = [one.name for one in session.inputs]
        if len(wanted) == len(given) and not set(wanted) <= set(given):  # renamed, in the order of the model
            given = dict(zip(wanted, given.values(), strict=True))
        if missing := [name for name in wanted if name not in given]:
            raise LoweringError(f"the model takes {wanted}, and {missing} are no inputs of the graph: {list(given)}")
        results = session.run([given[name] for name in wanted])
        return pytree.tree_unflatten(results, self._signature.out_spec)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to ``path``, which ends in ``.xml``, and its constants to the ``.bin`` beside it.

        Never the graph of one model beside the constants of another: see `lowering.openvino.files`. Raises
        `LoweringError` for another suffix, OSError.
        """
        write_pair(Path(path), self.xml, self.weights)
