"""Options that several verbs have, and what is read by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quant2e.cli.inputs.arguments import DataSource, Existing, ImageSize, NumberList, OutputFile, PageFile
from quant2e.cli.targets import DEFAULT_RECIPE, ISAS, TARGETS

if TYPE_CHECKING:
    from quant2e.cli.inputs.data import Batches
    from quant2e.cli.inputs.taken import Taken

F = TypeVar("F", bound=Callable[..., Any])

FLOAT_MODEL = Existing(".pt2", code=True)
QUANTIZED_MODEL = Existing(".pt2")
PROGRAM = Existing(".pte", ".onnx", ".xml", ".pt2")
POSITIVE = click.IntRange(min=1)

float_model = click.argument("model", type=FLOAT_MODEL, metavar="MODEL")

_SUMMARIES = "; ".join(f"{name}: {target.summary}" for name, target in TARGETS.items())

target_option = click.option(
    "--target", type=click.Choice(list(TARGETS)), required=True, help=f"What will run the model. {_SUMMARIES}."
)
isa_option = click.option(
    "--isa",
    type=click.Choice(ISAS),
    help="Processors that will run it, where the target's kernels depend on them: without VNNI int8 kernels add two "
    "products in 16 bits, and ranges leave room for that (default: this processor).",
)
recipe_option = click.option(
    "--recipe",
    metavar="NAME|FILE",
    help=f"How it is quantized: {DEFAULT_RECIPE} (the default), w8a8-dynamic, w8, w4-g32 …, or a recipe as .yaml or "
    ".json.",
)
dynamic_batch_option = click.option(
    "--dynamic-batch", type=POSITIVE, metavar="N", help="Of a module:function: its batch varies, up to N samples."
)
program_option = click.option(
    "--program",
    type=OutputFile(*{t.suffix: None for t in TARGETS.values()}),
    help="Also lower it to this file, and verify.",
)

html_option = click.option(
    "--html", type=PageFile(".html", ".htm"), help="Write what was found as a page of HTML, too."
)


def page_written(html: Path | None, report: Any, *others: Any) -> list[str]:
    """The page of what was found, where one is asked for, and the line that says so."""
    if html is None:
        return []
    report.to_html(html, *others)
    return [f"wrote {html} ({html.stat().st_size:,} bytes)"]


def data_options(*, required: bool, what: str) -> Callable[[F], F]:
    """``--data`` and how it is read. ``what``: the data is for, in help."""
    options = (
        click.option(
            "--data",
            type=DataSource(),
            required=required,
            metavar="PATH",
            help=f"{what}: an .npz or .safetensors file (an array for each input, samples along the first axis), or a "
            "folder of images, of .npy files (one sample each) or of .npz files (one call each).",
        ),
        click.option(
            "--batch-size", type=POSITIVE, metavar="N", help="Samples of a call, where the model's batch varies."
        ),
        click.option("--num-batches", type=POSITIVE, metavar="N", help="Use so many calls at most."),
        click.option(
            "--image-size",
            type=ImageSize(),
            metavar="HxW",
            help="Images: their size for the model (default: what its input says).",
        ),
        click.option(
            "--resize", type=POSITIVE, metavar="N", help="Images: shorter side to N, then cut out the centre."
        ),
        click.option(
            "--mean", type=NumberList(), metavar="M,M,M", help="Images: subtracted from values of 0 to 1 (default: 0)."
        ),
        click.option(
            "--std",
            type=NumberList(positive=True),
            metavar="S,S,S",
            help="Images: what values are divided by after that (default: 1).",
        ),
    )
    return lambda function: reduce(lambda made, option: option(made), reversed(options), function)


DATA = ("data", "batch_size", "num_batches", "image_size", "resize", "mean", "std")
"""Names of the arguments of `data_options`."""


def read_batches(given: Mapping[str, Any], taken: Taken) -> Batches | None:
    """The data that `data_options` name, as calls of a model; None where none is named. Says how it was read."""
    from quant2e.cli.inputs.data import read_data
    from quant2e.cli.inputs.images import Preprocessing

    images = Preprocessing(
        size=given["image_size"], resize=given["resize"], mean=given["mean"] or (), std=given["std"] or ()
    )
    if given["data"] is None:
        if images.given or given["batch_size"] or given["num_batches"]:
            raise click.UsageError("these options say how --data is read, and there is no --data")
        return None
    batches = read_data(Path(given["data"]), taken, given["batch_size"], images).first(given["num_batches"])
    for note in batches.notes:
        click.echo(f"data: {note}", err=True)
    return batches


def asked_algorithms(text: str | None, of_recipe: Any) -> Any:
    """Algorithms as `quant2e.quantize` takes them: those named, or else those of the recipe."""
    if text is None:
        return of_recipe
    if of_recipe:
        raise click.UsageError("both the recipe and --algorithms say which algorithms to run: leave one of them out")
    return text if text == "auto" else [part.strip() for part in text.split(",")]
