"""``quant2e inspect``: what is in a file, of every kind that deployers have. Nothing of a file is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant2e.cli.options import PROGRAM, html_option, page_written
from quant2e.cli.targets import looked_up
from quant2e.cli.verb import VerbResult, verb

if TYPE_CHECKING:
    from quant2e.quantized_model import QuantizedModel

_EXAMPLE = """
example:
  quant2e inspect model_int8.pt2
  quant2e inspect model_int8.pt2 --ops --html report.html
  quant2e inspect model.pt2 model_int8.pte model_int8.onnx model_aot.pt2 --json

A .pt2 is a float or a quantized model, or a package of AOTInductor; a .pte is a program of ExecuTorch, an .xml, with
the .bin beside it, one of OpenVINO. Files are only read: no runtime opens them, and nothing in them is run.
"""


@verb("inspect", example=_EXAMPLE)
@click.argument("files", nargs=-1, required=True, type=PROGRAM, metavar="FILE...")
@html_option
@click.option("--ops", is_flag=True, help="Of a quantized model: also the verdict of every op.")
@click.option("--scales", is_flag=True, help="Of a quantized model or package: also every scale and zero point.")
def inspect_files(files: tuple[Path, ...], html: Path | None, ops: bool, scales: bool) -> VerbResult:
    """Show what is in a model or program file, of any kind."""
    if html is not None and len(files) > 1:
        raise click.UsageError("--html is the page of one file")
    texts, found = [], []
    for path in files:
        kind, text, data, report = _inspected(path, ops=ops, scales=scales)
        if html is not None and report is None:
            raise click.UsageError(f"{path} is a {kind}, which has no report to make a page of")
        text = "\n".join([text, *page_written(html, report)])
        size = path.stat().st_size
        texts.append(f"{path}: {kind}, {size:,} bytes\n{text}")
        found.append({"path": str(path), "kind": kind, "bytes": size, **data})
    return VerbResult(text="\n\n".join(texts), data={"files": found})


_Found = tuple[str, str, Mapping[str, Any], Any]
"""What kind of file it is, what is to be said of it as text and as data, and the report of its quantization, if any."""


def _inspected(path: Path, *, ops: bool, scales: bool) -> _Found:
    from quant2e.storage.inductor_package import is_package

    if path.suffix == ".pte":
        return _pte(path)
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".xml":
        return _openvino(path)
    if is_package(path):
        return _package(path, ops=ops, scales=scales)
    from quant2e.cli.inputs.models import is_quantized
    from quant2e.quantized_model import load

    model = load(path)
    if is_quantized(model.module):
        return _quantized(model, ops=ops, scales=scales)
    return _float(model, ops=ops)


def _pte(path: Path) -> _Found:
    contents = looked_up("lowering.executorch.pte_contents:pte_contents")(path.read_bytes(), str(path))
    return _program("program of ExecuTorch", path, contents)


def _onnx(path: Path) -> _Found:
    return _program("ONNX model", path, looked_up("lowering.onnx.contents:onnx_contents")(path))


def _openvino(path: Path) -> _Found:
    return _program("OpenVINO model", path, looked_up("lowering.openvino.contents:openvino_contents")(path))


def _program(kind: str, path: Path, contents: Any) -> _Found:
    whole, data = _checksum(path)
    return kind, f"{contents}\n{whole}", {**contents.as_dict(), **data}, None


def _checksum(path: Path) -> tuple[str, dict[str, Any]]:
    from quant2e.checksum import check_file

    unchanged = check_file(path)
    said = "matches" if unchanged else "none, so nothing tells whether the file is as it was written"
    return f"checksum: {said}", {"checksum": unchanged}


def _package(path: Path, *, ops: bool, scales: bool) -> _Found:
    from quant2e.storage.inductor_package import read_package_record

    kind = "package of AOTInductor (native code)"
    whole, data = _checksum(path)
    record = read_package_record(path)
    if record is None:
        return kind, f"it says nothing of what it takes: quant2e did not make it\n{whole}", data, None
    sizes = [
        [low if low == high else f"{low}..{high if high < 1 << 31 else ''}" for low, high in one.sizes]
        for one in record.inputs
    ]
    lines = [
        f"takes '{one.name}': {str(one.dtype).removeprefix('torch.')}[{', '.join(map(str, own))}]"
        for one, own in zip(record.inputs, sizes, strict=True)
    ]
    lines.append(f"compiled for {record.instructions}, by " + ", ".join(f"{k} {v}" for k, v in record.versions.items()))
    lowering = record.lowering
    lines += [str(lowering.get("headline", "")), *(f"note: {note}" for note in lowering.get("notes", ()))]
    if record.report.verdicts:
        lines.append(
            _report(record.report, f"quantized by {record.encodings.quantizer or 'an unnamed quantizer'}", ops=ops)
        )
    lines += _scales(record.encodings) if scales else []
    return kind, "\n".join([*filter(None, lines), whole]), {**data, **record.as_dict()}, record.report


def _report(report: Any, title: str, *, ops: bool) -> str:
    return f"{title}:\n{report}" if ops else str(report.summary(title))


def _scales(encodings: Any) -> list[str]:
    return [str(encodings)]


def _takes(model: QuantizedModel) -> tuple[list[str], list[dict[str, Any]]]:
    from quant2e.cli.inputs.taken import Taken
    from quant2e.graph.captured.calls import Call

    if not model.example_inputs and not model.example_kwargs:
        return ["takes nothing that the file tells of"], []
    taken = Taken(model.module, Call(model.example_inputs, dict(model.example_kwargs)))
    return [f"takes {one}" for one in taken.tensors], [one.as_dict() for one in taken.tensors]


def _quantized(model: QuantizedModel, *, ops: bool, scales: bool) -> _Found:
    takes, data = _takes(model)
    by = f"quantized by {model.encodings.quantizer}" if model.encodings.quantizer else "quantized"
    lines = [*takes, _report(model.report, by, ops=ops), *(_scales(model.encodings) if scales else [])]
    found = {"inputs": data, "report": model.report.as_dict(), "encodings": model.encodings.as_dict()}
    return "quantized model", "\n".join(lines), found, model.report


def _float(model: QuantizedModel, *, ops: bool) -> _Found:
    from collections import Counter

    from quant2e.report.report import tensor_bytes

    takes, data = _takes(model)
    graph = model.module.graph
    counts = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
    size = tensor_bytes(model.module)
    shown = counts.most_common(None if ops else 12)
    more = f", and {len(counts) - len(shown)} other kinds (--ops)" if len(counts) > len(shown) else ""
    lines = [*takes, f"parameters and buffers: {size:,} bytes"]
    lines.append(f"{sum(counts.values())} ops: " + ", ".join(f"{count} × {name}" for name, count in shown) + more)
    return "float model", "\n".join(lines), {"inputs": data, "tensor_bytes": size, "ops": dict(counts)}, None
