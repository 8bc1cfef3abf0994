"""How many delegates a model becomes on ExecuTorch: with ExecuTorch's own quantizer and flow, and with ours.

``python -m benchmarks.partitions`` lowers every model by both flows and writes ``benchmarks/results/partitions.md``;
the rows are kept in ``partitions.json`` beside it, so that ``--models`` and ``--flows`` redo some of them. ``--small``:
images of 64 × 64 and transformers of two narrow layers, for structure in minutes; a full run takes about half an hour.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.demo.minilm import MAX_TOKENS, SentenceEmbedder, model_folder
from benchmarks.peers.models import MINILM
from benchmarks.programs import FLOWS, Inputs
from benchmarks.shapes import SHAPES, bert_base, mobilenet_v2, mobilenet_v3, resnet18, vit
from quant2e.files import write_text

RESULTS = Path(__file__).parent / "results" / "partitions.md"
MODELS = (*SHAPES, MINILM)
TRANSFORMERS = ("ViT-B/16", "BERT-base", MINILM)
Make = Callable[[], tuple[nn.Module, Inputs]]


def _images() -> Inputs:
    return (torch.randn(1, 3, 64, 64),)


def _minilm() -> tuple[nn.Module, Inputs]:
    """The real weights, and a sentence that leaves half of its places empty."""
    tokens = torch.randint(1000, 30_000, (1, MAX_TOKENS))
    mask = (torch.arange(MAX_TOKENS) < MAX_TOKENS // 2).long()[None]
    return SentenceEmbedder(model_folder()).eval(), (tokens, mask)


SMALL: Mapping[str, Make] = {
    "ResNet-18": lambda: (resnet18(), _images()),
    "MobileNetV2": lambda: (mobilenet_v2(), _images()),
    "MobileNetV3": lambda: (mobilenet_v3(), _images()),
    "ViT-B/16": lambda: (vit(2, 64, 4, 16, 64), _images()),
    "BERT-base": lambda: (bert_base(2), (torch.randint(0, 30_000, (1, 16)),)),
}
"""The same structures, smaller. MiniLM comes in one size."""


def full(name: str) -> Make:
    """A model of the published size and one input."""
    if name == MINILM:
        return _minilm
    make, make_inputs = SHAPES[name]
    return lambda: (make(), make_inputs(1))


def schemes(name: str) -> tuple[str, ...]:
    """How a model is quantized: transformers both ways."""
    return ("static", "dynamic") if name in TRANSFORMERS else ("static",)


def measure(name: str, make: Make, flow: str, scheme: str, size: str) -> dict[str, Any]:
    """A row: what one flow makes of one model, or why it fails."""
    torch.manual_seed(0)
    model, inputs = make()
    row = {"model": name, "scheme": scheme, "size": size, "flow": flow}
    try:
        program = FLOWS[flow](model, inputs, scheme)
    except Exception as error:  # noqa: BLE001  # a flow that fails has a row that says so
        return row | {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    row |= {key: value for key, value in asdict(program).items() if key != "buffer"}
    return row | {"bytes": len(program.buffer)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, the two flows side by side."""
    before, after = FLOWS
    lines = [
        "# Delegates: before and after",
        "",
        f"Before: {before}, with its own quantizer; after: {after}. Written by `python -m benchmarks.partitions`.",
        "Small: 64 × 64 images, transformers of two layers.",
        "",
        "| model | scheme | size | delegates before | kernels before | delegates after | kernels after | left after |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    keys = dict.fromkeys((row["model"], row["scheme"], row["size"]) for row in rows)
    for key in keys:
        found = {row["flow"]: row for row in rows if (row["model"], row["scheme"], row["size"]) == key}
        cells = [cell for flow in (before, after) for cell in _counts(found.get(flow))]
        left = found.get(after, {}).get("left", {})
        lines.append(f"| {' | '.join((*key, *cells))} | {', '.join(f'{n} × {op}' for op, n in left.items()) or '–'} |")
    errors = [row for row in rows if "error" in row]
    lines += ["", *(f"{row['flow']} fails on {row['model']}, {row['scheme']}: {row['error']}" for row in errors)]
    return "\n".join(lines).rstrip() + "\n"


def _counts(row: dict[str, Any] | None) -> tuple[str, str]:
    if row is not None and "error" in row:
        return "fails", "fails"
    return (str(len(row["delegates"])), str(sum(row["left"].values()))) if row else ("–", "–")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--flows", nargs="*", default=list(FLOWS), choices=list(FLOWS))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    kept = chosen.out.with_suffix(".json")
    rows = {tuple(row[k] for k in ("model", "scheme", "size", "flow")): row for row in _read(kept)}
    for name in chosen.models:
        size = "small" if chosen.small and name in SMALL else "full"
        make = SMALL[name] if size == "small" else full(name)
        for scheme in schemes(name):
            for flow in chosen.flows:
                row = measure(name, make, flow, scheme, size)
                rows[name, scheme, size, flow] = row
                print(name, scheme, flow, row.get("error") or (len(row["delegates"]), row["left"]), flush=True)
                write_text(kept, json.dumps(list(rows.values()), indent=1) + "\n")
    listed = sorted(rows.values(), key=lambda row: (row["size"], MODELS.index(row["model"]), row["scheme"] != "static"))
    write_text(chosen.out, table(listed))


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


if __name__ == "__main__":
    main()
