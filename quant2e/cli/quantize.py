"""``quant2e quantize``: a float model becomes a quantized one, and a program of its target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quant2e.cli.inputs.arguments import FunctionName, OutputFile, Share
from quant2e.cli.options import (
    asked_algorithms,
    data_options,
    dynamic_batch_option,
    float_model,
    html_option,
    isa_option,
    page_written,
    program_option,
    read_batches,
    recipe_option,
    target_option,
)
from quant2e.cli.targets import check_isa, check_program_path, quantizer_of, written
from quant2e.cli.verb import VerbResult, verb

_EXAMPLE = """
example:
  quant2e quantize model.pt2 --data calib.npz --target xnnpack -o model_int8.pt2 --program model_int8.pte

more:
  quant2e quantize model.pt2 --data photos/ --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 \\
      --target x86 -o model_int8.pt2
  quant2e quantize my_model:build --data calib.npz --target onnx --program model_int8.onnx --dynamic-batch 64
  quant2e quantize model.pt2 --data calib.npz --target xnnpack -o model_int8.pt2 \\
      --evaluate my_metrics:top1 --max-drop 0.5%

MODEL is a float .pt2 file, as torch.export.save writes it, or module:function: code of yours, which is imported from
here and run, and returns (model, example_inputs). A .pt2 file is only read; nothing in it is run.
--evaluate is code of yours as well: a function of a model that returns its metric, the higher the better.
"""


@verb("quantize", example=_EXAMPLE)
@float_model
@target_option
@isa_option
@data_options(required=False, what="What ranges are found on (not needed by dynamic and weight-only recipes)")
@click.option("-o", "--output", type=OutputFile(".pt2"), help="Write the quantized model to this .pt2 file.")
@program_option
@recipe_option
@click.option(
    "--algorithms",
    metavar="auto|NAME,…",
    help="What may mend accuracy: auto tries what may help; or names (equalize, smooth, correct_bias, gptq …).",
)
@click.option("--evaluate", type=FunctionName(), help="Leave ops float until this metric keeps --max-drop.")
@click.option(
    "--max-drop", type=Share(), help="Of --evaluate: share of the float metric that may be lost (default: 1%)."
)
@html_option
@click.option("--min-sqnr", type=float, default=10.0, show_default=True, metavar="DB", help="Least SQNR against float.")
@dynamic_batch_option
def quantize_file(
    model: str,
    target: str,
    isa: str | None,
    output: Path | None,
    program: Path | None,
    recipe: str | None,
    algorithms: str | None,
    evaluate: str | None,
    max_drop: float | None,
    html: Path | None,
    min_sqnr: float,
    dynamic_batch: int | None,
    **data: Any,
) -> VerbResult:
    """Quantize a float model, and make a program of it if asked to."""
    if output is None and program is None:
        raise click.UsageError("nothing to write: give --output FILE.pt2, --program FILE, or both")
    check_isa(target, isa)
    if program is not None:
        check_program_path(program, target)
    if max_drop is not None and evaluate is None:
        raise click.UsageError("--max-drop goes with --evaluate, the function that returns the metric")
    import quant2e
    from quant2e.cli.inputs.models import read_float_model
    from quant2e.cli.inputs.taken import Taken
    from quant2e.cli.inputs.user_code import user_function

    metric = None if evaluate is None else user_function(evaluate)
    quantizer, of_recipe = quantizer_of(target, recipe, isa)
    source = read_float_model(model, dynamic_batch)
    batches = read_batches(data, Taken(source.graph, source.example))
    result = quant2e.quantize(
        source.graph,
        source.example,
        quantizer,
        batches,
        algorithms=asked_algorithms(algorithms, of_recipe),
        evaluate=metric,
        max_drop=max_drop,
        min_sqnr_db=min_sqnr,
    )
    files = written(result, output, target, program)
    shown: list[Any] = [result.report]
    found: dict[str, Any] = {"report": result.report.as_dict(), "data": None if batches is None else batches.as_dict()}
    found |= files.files
    if files.program_report is not None:
        found["program_report"] = files.program_report.as_dict()
        shown.append(files.program_report)
    text = [repr(result), *files.lines, *page_written(html, *shown)]
    return VerbResult(text="\n".join(text), data=found)
