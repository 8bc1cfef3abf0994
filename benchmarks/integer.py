"""The integer representation of the two demo models: how exact it is, and what it costs in eager mode.

    python -m benchmarks.integer [--only digits|minilm] [--output FOLDER]

For each quantizer: ops that compute in integers, seconds to write the graph, outputs that differ from the Q/DQ graph
and (digits) from the ExecuTorch runtime, and the time of one call over that of the Q/DQ graph, both in eager mode.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lowering
import quant2e
from benchmarks import timing
from benchmarks.demo import digits, minilm, topics
from quant2e.files import write_text
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)

LIMIT = 5.0
"""The integer graph takes at most this many times as long as the Q/DQ graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model, one quantizer, one workload. ``cosine``: of the outputs of the integer and the Q/DQ graph, the
    smallest.

    ``runtime_differences``: outputs that differ from ExecuTorch's; None where it was not run.
    """

    model: str
    quantizer: str
    workload: str
    integer_ops: int
    left: int
    write_seconds: float
    cosine: float
    runtime_differences: int | None
    qdq_ms: float
    integer_ms: float
    ratio: float

    def __str__(self) -> str:
        runtime = (
            "" if self.runtime_differences is None else f", {self.runtime_differences} outputs differ from ExecuTorch"
        )
        return (
            f"{self.model}, {self.quantizer}, {self.workload}: {self.integer_ops} ops in integers, {self.left} left; "
            f"written in {self.write_seconds:.2f} s; cosine to Q/DQ {self.cosine:.6f}{runtime}; "
            f"{self.integer_ms:.2f} ms, Q/DQ {self.qdq_ms:.2f} ms: {self.ratio:.2f} x"
        )


def quantizers(*, dynamic: bool) -> dict[str, Any]:
    """The backends' quantizers, static and, where a model is worth it, dynamic."""
    found: dict[str, Any] = {}
    for is_dynamic in (False, True) if dynamic else (False,):
        kind = "dynamic" if is_dynamic else "static"
        xnnpack = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=is_dynamic)
        x86 = get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic)
        found[f"XNNPACK {kind}"] = XNNPACKQuantizer().set_global(xnnpack)
        found[f"x86 {kind}"] = X86InductorQuantizer().set_global(x86)
    return {name: ComposableQuantizer([EmbeddingQuantizer(), q]) if dynamic else q for name, q in found.items()}


def measure(
    name: str,
    quantizer_name: str,
    result: quant2e.QuantizedModel,
    workloads: dict[str, tuple[Any, ...]],
    *,
    runtime: bool,
) -> Iterator[Row]:
    """Rows of one quantized model, one for each workload."""
    start = time.perf_counter()
    integer = quant2e.to_integer(result.module)
    seconds = time.perf_counter() - start
    report = quant2e.integer_report(integer)
    program = lowering.to_executorch(result) if runtime else None
    for workload, inputs in workloads.items():
        with torch.no_grad():
            ours, reference = integer(*inputs), result.module(*inputs)
            differences = None if program is None else int((program(*inputs) != ours).sum())
            cosine = float(torch.nn.functional.cosine_similarity(ours.flatten(1), reference.flatten(1)).min())
            latency = timing.compare(
                partial(result.module, *inputs),
                partial(integer, *inputs),
                runtime="eager",
                what=workload,
            )
        yield Row(
            model=name,
            quantizer=quantizer_name,
            workload=workload,
            integer_ops=sum(v.integer for v in report.verdicts),
            left=len(report.left),
            write_seconds=seconds,
            cosine=cosine,
            runtime_differences=differences,
            qdq_ms=latency.float_ms,
            integer_ms=latency.int8_ms,
            ratio=1 / latency.speedup,
        )


def run_digits() -> Iterator[Row]:
    """The residual network on handwritten digits; trained for two epochs, which its arithmetic does not notice."""
    data = digits.load()
    model = digits.train(data, epochs=2)
    calibration = [(images,) for images in data.train_images[:512].split(32)]
    workloads = {"1 image": (data.test_images[:1],), "64 images": (data.test_images[:64],)}
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    for name, quantizer in quantizers(dynamic=False).items():
        result = quant2e.quantize(model, calibration[0], quantizer, calibration, dynamic_shapes=shapes)
        yield from measure("digits", name, result, workloads, runtime=name.startswith("XNNPACK"))


def run_minilm() -> Iterator[Row]:
    """Sentence embeddings with all-MiniLM-L6-v2."""
    from transformers import AutoTokenizer

    folder = minilm.model_folder()
    model = minilm.SentenceEmbedder(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = topics.load()
    calibration = [b.inputs for b in minilm.tokenize(tokenizer, minilm.spread(texts.calibration, 64), size=16)]
    single = minilm.tokenize(tokenizer, sorted(texts.queries, key=len)[len(texts.queries) // 2 :][:1])[0].inputs
    many = minilm.tokenize(tokenizer, texts.corpus)
    paragraphs = many[len(many) // 2].inputs
    workloads = {
        f"1 sentence, {single[0].shape[1]} tokens": single,
        f"{len(paragraphs[0])} paragraphs, {paragraphs[0].shape[1]} tokens": paragraphs,
    }
    batch, tokens = (
        torch.export.Dim("batch", min=1, max=minilm.BATCH),
        torch.export.Dim("tokens", min=2, max=minilm.MAX_TOKENS),
    )
    shapes = ({0: batch, 1: tokens}, {0: batch, 1: tokens})
    for name, quantizer in quantizers(dynamic=True).items():
        result = quant2e.quantize(model, calibration[0], quantizer, calibration, dynamic_shapes=shapes)
        yield from measure("minilm", name, result, workloads, runtime=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``integer.json``; 1 when a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("digits", "minilm"))
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    print(timing.machine())
    rows = []
    for name, run in (("digits", run_digits), ("minilm", run_minilm)):
        for row in run() if options.only in (None, name) else ():
            print(row, flush=True)
            rows.append(row)
    options.output.mkdir(parents=True, exist_ok=True)
    found = {"machine": asdict(timing.machine()), "limit": LIMIT, "rows": [asdict(row) for row in rows]}
    write_text(options.output / "integer.json", json.dumps(found, indent=1) + "\n")
    broken = [row for row in rows if row.ratio > LIMIT or row.runtime_differences]
    for row in broken:
        print(f"BEYOND ITS LIMIT: {row}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
