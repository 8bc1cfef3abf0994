"""``quant2e verify``: a program beside the quantized model that it was made from, on the same data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from quant2e.cli.options import PROGRAM, QUANTIZED_MODEL, data_options, read_batches
from quant2e.cli.targets import looked_up
from quant2e.cli.verb import VerbResult, verb

_EXAMPLE = """
example:
  quant2e verify model_int8.pt2 model_int8.pte --data calib.npz

The program is run on this machine, a .pte in the ExecuTorch runtime, an .onnx in onnxruntime, an .xml in OpenVINO, and
compared with the model, output by output. One step is one integer of the quantized output. A program passes with at
most --steps steps anywhere, or with an SQNR of at least --sqnr dB over all the data; otherwise the exit code is 1.
Without --data it is compared on inputs that look like those the model was captured with. A package of AOTInductor is
native code, and is run: verify one that you trust as you trust a program.
"""


@verb("verify", example=_EXAMPLE)
@click.argument("model", type=QUANTIZED_MODEL, metavar="MODEL_INT8.pt2")
@click.argument("program", type=PROGRAM, metavar="PROGRAM")
@data_options(required=False, what="What to compare on")
@click.option("--steps", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Largest difference.")
@click.option("--sqnr", type=float, metavar="DB", help="Least SQNR instead (default: 40, of a package 30).")
@click.option("--method", metavar="NAME", help='Of a .pte: the method to run (default: "forward").')
def verify_file(
    model: Path, program: Path, steps: float, sqnr: float | None, method: str | None, **data: Any
) -> VerbResult:
    """Run a program and compare it with its quantized model."""
    from quant2e.cli.inputs.models import read_quantized_model
    from quant2e.cli.inputs.taken import Taken
    from quant2e.graph.captured.calls import Call

    quantized = read_quantized_model(model)
    example = Call(quantized.example_inputs, dict(quantized.example_kwargs))
    taken = Taken(quantized.module, example)
    batches = read_batches(data, taken)
    opened = looked_up("lowering.files.program_file:open_native")(program, method)
    usual = looked_up("lowering.inductor.source:BOUND" if program.suffix == ".pt2" else "lowering.verify:USUAL")
    bound = replace(usual, steps=steps, sqnr_db=usual.sqnr_db if sqnr is None else sqnr)
    found = looked_up("lowering:verify")(
        taken.callable(opened), quantized, [example] if batches is None else batches, bound=bound
    )
    failure = "" if found.passed else f"{program} does not compute what {model} says: {found}"
    return VerbResult(
        text=f"{program} against {model}: {found}", data={**found.as_dict(), "passed": found.passed}, failure=failure
    )
