"""``quant2e lower``: a quantized model becomes a program of a target, compared with the model before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quant2e.cli.inputs.arguments import OutputFile
from quant2e.cli.options import QUANTIZED_MODEL, data_options, read_batches, target_option
from quant2e.cli.targets import TARGETS, check_program_path, lowered, program_files, wrote
from quant2e.cli.verb import VerbResult, verb

_EXAMPLE = """
example:
  quant2e lower model_int8.pt2 --target xnnpack -o model_int8.pte

more:
  quant2e lower model_int8.pt2 --target x86 -o model_aot.pt2 --data calib.npz --num-batches 4
  quant2e lower model_int8.pt2 --target onnx -o model_int8.onnx

The program is run and compared with the model, on inputs that look like those it was captured with and on --data; one
that computes something else is not written. Lower for the target that the model was quantized for.
"""


@verb("lower", example=_EXAMPLE)
@click.argument("model", type=QUANTIZED_MODEL, metavar="MODEL_INT8.pt2")
@target_option
@click.option(
    "-o",
    "--output",
    type=OutputFile(*dict.fromkeys(t.suffix for t in TARGETS.values())),
    required=True,
    help="The program.",
)
@click.option("--no-verify", is_flag=True, help="Do not run the program, nor compare it.")
@data_options(required=False, what="Also compare on this")
def lower_file(model: Path, target: str, output: Path, no_verify: bool, **data: Any) -> VerbResult:
    """Make a program of a quantized model, and verify it."""
    check_program_path(output, target)
    if no_verify and data["data"] is not None:
        raise click.UsageError("--data is what the program is compared on, and --no-verify says not to compare it")
    from quant2e.cli.inputs.models import read_quantized_model
    from quant2e.cli.inputs.taken import Taken
    from quant2e.graph.captured.calls import Call

    quantized = read_quantized_model(model)
    taken = Taken(quantized.module, Call(quantized.example_inputs, dict(quantized.example_kwargs)))
    batches = read_batches(data, taken)
    made = lowered(target, quantized, output, verify=not no_verify, data=batches or ())
    size = sum(one.stat().st_size for one in program_files(output))
    text = "\n".join([repr(made), *wrote(output)])
    return VerbResult(text=text, data={"program": str(output), "bytes": size, "report": made.report.as_dict()})
