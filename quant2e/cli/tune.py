"""``quant2e tune``: the cheapest mix of precisions that keeps a metric of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quant2e.cli.inputs.arguments import FunctionName, OutputFile, Share
from quant2e.cli.options import (
    POSITIVE,
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
  quant2e tune model.pt2 --data calib.npz --target xnnpack --evaluate my_metrics:top1 --max-drop 0.5% \\
      -o model_int8.pt2

my_metrics.py:
  def top1(model):                      # called with the float model, then with quantized ones
      return accuracy(model, images, labels)

--evaluate is code of yours, which is imported from here and run. Ops are left float, group by group, until the metric
is kept. Where no mix keeps it, the best one is written all the same, and the exit code is 1. So it is after Ctrl-C once
a trial is finished, with exit code 130; a second Ctrl-C writes nothing. With --storage a run that was stopped goes on
where it was, and several processes share the work.
"""

_STRATEGIES = ("sensitivity", "bisect", "mse", "bayesian", "random", "exhaustive")


@verb("tune", example=_EXAMPLE)
@float_model
@target_option
@isa_option
@data_options(required=False, what="What ranges are found on (not needed by dynamic and weight-only recipes)")
@click.option("--evaluate", type=FunctionName(), required=True, help="The function that returns the metric of a model.")
@click.option(
    "--max-drop",
    type=Share(units=True),
    default="1%",
    show_default=True,
    help="Share of the float metric to lose at most.",
)
@click.option("--absolute", is_flag=True, help="--max-drop is in units of the metric, not a share of it.")
@click.option("--lower-is-better", is_flag=True, help="The metric is a loss or an error.")
@click.option("-o", "--output", type=OutputFile(".pt2"), help="Write the quantized model to this .pt2 file.")
@program_option
@recipe_option
@html_option
@click.option("--algorithms", metavar="auto|NAME,…", help="What may mend accuracy, as one more choice for each group.")
@click.option("--strategy", type=click.Choice(_STRATEGIES), default="sensitivity", show_default=True)
@click.option("--max-trials", type=POSITIVE, metavar="N", help="Begin no more trials than that.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Begin none after that."
)
@click.option("--storage", metavar="FILE|URL", help="Keep trials in a journal file or a database (needs optuna).")
@dynamic_batch_option
def tune_file(
    model: str,
    target: str,
    isa: str | None,
    evaluate: str,
    max_drop: float,
    absolute: bool,
    lower_is_better: bool,
    output: Path | None,
    program: Path | None,
    recipe: str | None,
    algorithms: str | None,
    strategy: str,
    max_trials: int | None,
    timeout: float | None,
    storage: str | None,
    dynamic_batch: int | None,
    html: Path | None,
    **data: Any,
) -> VerbResult:
    """Find the cheapest mix of precisions that keeps a metric."""
    if max_drop > 1.0 and not absolute:
        raise click.UsageError(f"--max-drop {max_drop:g} is more than all of the metric: 0.5%, or --absolute")
    check_isa(target, isa)
    if program is not None:
        check_program_path(program, target)
    import quant2e
    from quant2e.cli.inputs.models import read_float_model
    from quant2e.cli.inputs.taken import Taken
    from quant2e.cli.inputs.user_code import user_function

    metric = user_function(evaluate)
    quantizer, of_recipe = quantizer_of(target, recipe, isa)
    source = read_float_model(model, dynamic_batch)
    batches = read_batches(data, Taken(source.graph, source.example))
    chosen: Any = strategy
    found = quant2e.tune(
        source.graph,
        source.example,
        quantizer,
        batches,
        metric,
        max_drop=max_drop,
        relative=not absolute,
        higher_is_better=not lower_is_better,
        strategy=chosen,
        algorithms=asked_algorithms(algorithms, of_recipe),
        max_trials=max_trials,
        timeout=timeout,
        storage=storage,
    )
    files = written(found.model, output, target, program)
    text = [repr(found), *files.lines, *page_written(html, found.model.report, found)]
    failure = "" if found.met else f"no mix that was tried keeps the goal ({found.goal})"
    if found.met and not found.choices:
        failure = f"the goal is kept only with every op left float ({found.goal})"
    if found.interrupted:
        failure = f"stopped by Ctrl-C; this is the best of {len(found.trials)} trial(s)" + (failure and f": {failure}")
    data = {**found.as_dict(), **files.files}
    return VerbResult(text="\n".join(text), data=data, failure=failure, interrupted=found.interrupted)
