"""``quant2e sensitivity``: what each group of ops costs at the output when it is quantized, from one calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quant2e.cli.options import (
    data_options,
    dynamic_batch_option,
    float_model,
    html_option,
    isa_option,
    page_written,
    read_batches,
    recipe_option,
    target_option,
)
from quant2e.cli.targets import check_isa, quantizer_of
from quant2e.cli.verb import VerbResult, verb

_EXAMPLE = """
example:
  quant2e sensitivity model.pt2 --data calib.npz --target xnnpack

Groups are ops that are quantized together, the costliest first: the SQNR at the output with this group quantized alone
(low where it hurts), and with all but this one (high where leaving it float helps). Leave the worst ones float by a
recipe, or let quant2e tune find them.
"""


@verb("sensitivity", example=_EXAMPLE)
@float_model
@target_option
@isa_option
@data_options(required=True, what="What ranges are found on, but for a few calls to measure on")
@recipe_option
@html_option
@click.option(
    "--method",
    type=click.Choice(["toggle", "gradient"]),
    default="toggle",
    show_default=True,
    help="toggle: two evaluations a group; gradient: an estimate from one pass backwards.",
)
@click.option("--all", "everything", is_flag=True, help="Print every group, not the costliest only.")
@dynamic_batch_option
def sensitivity_of_file(
    model: str,
    target: str,
    isa: str | None,
    recipe: str | None,
    method: str,
    everything: bool,
    dynamic_batch: int | None,
    html: Path | None,
    **data: Any,
) -> VerbResult:
    """Show what quantizing each group of ops costs."""
    check_isa(target, isa)
    import quant2e
    from quant2e.cli.inputs.models import read_float_model
    from quant2e.cli.inputs.taken import Taken

    quantizer, _ = quantizer_of(target, recipe, isa)
    source = read_float_model(model, dynamic_batch)
    batches = read_batches(data, Taken(source.graph, source.example))
    assert batches is not None
    chosen: Any = method
    found = quant2e.sensitivity(source.graph, source.example, quantizer, batches, method=chosen)
    text = [str(found) if everything else repr(found), *page_written(html, found)]
    return VerbResult(text="\n".join(text), data=found.as_dict())
