"""``quant2e compare``: which ops of a quantized model lose what, against the float model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quant2e.cli.options import (
    PROGRAM,
    data_options,
    dynamic_batch_option,
    float_model,
    html_option,
    page_written,
    read_batches,
)
from quant2e.cli.targets import looked_up
from quant2e.cli.verb import VerbResult, verb

_EXAMPLE = """
example:
  quant2e compare model.pt2 model_int8.pt2 --data calib.npz

more:
  quant2e compare model.pt2 model_int8.pte --data calib.npz      # a program: its outputs alone

Of a quantized .pt2 file: per op, the error that it makes by itself and the one it has in the model, worst first, with
advice. MODEL is the float one: a .pt2 file, or module:function (code of yours, which is run).
"""


@verb("compare", example=_EXAMPLE)
@float_model
@click.argument("quantized", type=PROGRAM, metavar="QUANTIZED")
@data_options(required=True, what="What both are run on")
@html_option
@click.option("--all", "everything", is_flag=True, help="Print every op, not the worst ones only.")
@dynamic_batch_option
def compare_files(
    model: str, quantized: Path, everything: bool, dynamic_batch: int | None, html: Path | None, **data: Any
) -> VerbResult:
    """Show which ops of a quantized model lose what."""
    import quant2e
    from quant2e.cli.inputs.models import read_float_model, read_quantized_model
    from quant2e.cli.inputs.taken import Taken
    from quant2e.storage.inductor_package import is_package

    source = read_float_model(model, dynamic_batch)
    taken = Taken(source.graph, source.example)
    batches = read_batches(data, taken)
    assert batches is not None
    other: Any
    if quantized.suffix == ".pt2" and not is_package(quantized):
        other = read_quantized_model(quantized)
    else:
        other = taken.callable(looked_up("lowering.files.program_file:open_native")(quantized))
    found = quant2e.compare(source.graph, other, batches)
    text = [str(found) if everything else repr(found), *page_written(html, found)]
    return VerbResult(text="\n".join(text), data=found.as_dict())
