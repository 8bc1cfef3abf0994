"""OnnxProgram: an ONNX file, what onnxruntime makes of it, and how it compares with its graph."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lowering.onnx.session import run, session
from lowering.program import LoweredProgram, LoweringReport, Table
from lowering.signature import Signature
from lowering.verify import Verification
from quant2e.checksum import check_content
from quant2e.errors import FileFormatError, LoweringError
from quant2e.files import atomic_file

INTEGER_KERNELS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMatMul",
        "QLinearMul",
        "QLinearReduceMean",
        "QLinearSigmoid",
        "QLinearSoftmax",
    }
)
"""onnxruntime's ops that compute on integers."""

FLOAT_PRODUCTS = frozenset({"Conv", "FusedConv", "ConvTranspose", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"})
"""onnxruntime's ops that multiply floats."""

_WHY = {
    "MatMulNBits": (
        "MatMulNBits quantizes activations to 8 bits, which the graph does not say, unless the session option "
        "session.qdq_matmulnbits_accuracy_level is 1, as it is here"
    ),
    "": (
        "on x86 without VNNI, u8 × s8 kernels of onnxruntime saturate unless the session option "
        "session.x64quantprecision is 1, as it is in our own sessions on such machines"
    ),
}


def notes_on(kernels: Mapping[str, int]) -> tuple[str, ...]:
    """What somebody who runs the file elsewhere has to know, given the integer kernels in it."""
    return tuple(dict.fromkeys(_WHY.get(name, _WHY[""]) for name in sorted(kernels)))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class OnnxReport(LoweringReport):
    """What an ONNX file holds and what onnxruntime runs of it on integers.

    ``opset``; ``size``: bytes of the file; ``constants``: bytes of its constants by dtype; ``integer_kernels``: ops of
    onnxruntime's optimized graph that compute on integers, with how many there are; ``float_products``: those that
    multiply floats, by name; ``notes``: what to know. ``kernels`` and ``verification`` are None where nothing was run.
    """

    opset: int
    convention: str
    size: int
    constants: Mapping[str, int]
    integer_kernels: Mapping[str, int] | None = None
    float_products: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    verification: Verification | None = None

    @property
    def headline(self) -> str:
        held = ", ".join(f"{size:,} {name}" for name, size in sorted(self.constants.items(), key=lambda item: -item[1]))
        return f"ONNX, opset {self.opset}, for {self.convention}: {self.size:,} bytes; constants: {held} bytes"

    def table(self) -> Table:
        kernels = sorted((self.integer_kernels or {}).items())
        rows = [
            *((name, count, "on integers") for name, count in kernels),
            *((n, 1, "in float") for n in self.float_products),
        ]
        return ("onnxruntime's op", "count", "computes"), rows

    def __str__(self) -> str:
        lines = [self.headline]
        if self.integer_kernels is not None:
            kernels = ", ".join(f"{count} {name}" for name, count in sorted(self.integer_kernels.items()))
            lines.append(f"onnxruntime runs on integers: {kernels or 'nothing'}")
        lines += [f"float product: {name}" for name in self.float_products]
        lines += [f"note: {note}" for note in self.notes]
        if self.verification is not None:
            lines.append(f"against its Q/DQ graph: {self.verification}")
        return "\n".join(lines)


class OnnxProgram(LoweredProgram[OnnxReport]):
    """An ONNX file. ``path``: where it is; ``report``: what is in it and how it compares with its graph.

    Calling it runs it in onnxruntime on the CPU: it takes and returns what the model takes and returns.
    """

    def __init__(self, path: Path, report: OnnxReport, signature: Signature) -> None:
        self.path = path
        self._report = report
        self._signature = signature
        self._session: Any = None

    @property
    def report(self) -> OnnxReport:
        return self._report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on positional inputs and inputs by name, in any order.

        Raises `LoweringError` on other inputs, and `FileFormatError` when the file has changed since it was written.
        """
        flat = self._signature.plain(args, kwargs)
        if self._session is None:
            content = self.path.read_bytes()
            if not check_content(content, str(self.path)):
                raise FileFormatError(f"{self.path} is not the file that was written here: it carries no checksum")
            self._session = session(content)
        return run_session(self._session, flat, self._signature)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copy the file to ``path``."""
        with atomic_file(Path(path)) as part:
            shutil.copyfile(self.path, part)


def run_session(loaded: Any, flat: list[Any], signature: Signature) -> Any:
    """Outputs of a session as the model returns them."""
    wanted = [given.name for given in loaded.get_inputs()]
    pairs = [
        (spec.name, value) for spec, value in zip(signature.inputs, flat, strict=True) if isinstance(value, Tensor)
    ]
    by_name = dict(pairs)
    if len(wanted) == len(pairs) and not set(wanted) <= set(by_name):  # renamed, in the order of the model
        by_name = dict(zip(wanted, (value for _, value in pairs), strict=True))
    if missing := [name for name in wanted if name not in by_name]:
        raise LoweringError(f"the ONNX model takes {wanted}, and {missing} are no inputs of the graph: {list(by_name)}")
    results = run(loaded, [by_name[name] for name in wanted])
    return pytree.tree_unflatten(list(results), signature.out_spec)


def onnx_kernels(path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """What onnxruntime's optimized graph computes on integers, by op; and the names of its products of floats."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(path.read_bytes(), optimized)
        graph = onnx.load(os.fspath(optimized), load_external_data=False).graph
    return _integers(graph), tuple(_floats(graph))


def _integers(graph: Any) -> dict[str, int]:
    return dict(Counter(node.op_type for node in graph.node if node.op_type in INTEGER_KERNELS))


def _floats(graph: Any) -> Iterator[str]:
    """Products of floats by name, each with the reason as far as the graph tells it."""
    made = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type not in FLOAT_PRODUCTS:
            continue
        x, weight = (made.get(name) == "DequantizeLinear" for name in node.input[:2])
        why = "neither operand is quantized"
        if x and weight:
            why = "its operands are quantized and its result is not"
        elif x or weight:
            why = "one of its operands is not quantized"
        yield f"{node.op_type} '{node.name or node.output[0]}': {why}"
