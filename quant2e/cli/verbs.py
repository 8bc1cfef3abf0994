"""Verbs of the command line, found by name: help, and what is said of wrong arguments, cost the import of one file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

import click

from quant2e import __version__
from quant2e.cli.verb import Stopped

VERBS: Mapping[str, str] = {
    "quantize": "quant2e.cli.quantize:quantize_file",
    "inspect": "quant2e.cli.inspect:inspect_files",
    "lower": "quant2e.cli.lower:lower_file",
    "verify": "quant2e.cli.verify:verify_file",
    "compare": "quant2e.cli.compare:compare_files",
    "sensitivity": "quant2e.cli.sensitivity:sensitivity_of_file",
    "tune": "quant2e.cli.tune:tune_file",
    "bench": "quant2e.cli.bench:bench_files",
}
"""Verb → module and command, in the order in which help lists them."""

_GROUP_EXAMPLE = """
example:
  quant2e quantize model.pt2 --data images/ --target xnnpack -o model_int8.pt2 --program model_int8.pte
  quant2e inspect model_int8.pt2

QUANT2E VERB --help has an example for each verb. Exit codes: 0 all is well; 1 it could not be done, or what came out is
not good enough, and one sentence on stderr says why; 2 the arguments are wrong; 130 it was stopped by Ctrl-C.
"""


class Verbs(click.Group):
    """Commands that are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, name = VERBS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(_GROUP_EXAMPLE)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="quant2e")
def group() -> None:
    """Quantize models of PyTorch, look at what came out, and make programs of it. Nothing is silent."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, with ``sys.argv`` unless told otherwise; returns the exit code."""
    try:
        code = group.main(None if arguments is None else list(arguments), prog_name="quant2e", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("quant2e: stopped by Ctrl-C", err=True)
        return Stopped.exit_code
    return code if isinstance(code, int) else 0
