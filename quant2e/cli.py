"""The command line ``quant2e``. Each subcommand is a module that adds its parser and runs; it is found here by name."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

from quant2e.errors import Quant2eError

COMMANDS: Mapping[str, str] = {"bench": "lowering.bench.command"}
"""Subcommand → module with ``add_arguments(parser)``, which sets the parser's texts too, and ``run(options) -> int``.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 after an error of ours, 2 where arguments are wrong."""
    parser = argparse.ArgumentParser(prog="quant2e", description="A quantization compiler for exported PyTorch graphs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    runs = {}
    for name, module in COMMANDS.items():
        command = importlib.import_module(module)
        summary = (command.__doc__ or "").partition("\n")[0]
        own = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_arguments(own)
        runs[name] = command.run
    options = parser.parse_args(argv)
    try:
        return int(runs[options.command](options))
    except (Quant2eError, OSError) as error:
        print(f"quant2e {options.command}: {error}", file=sys.stderr)  # noqa: T201  # this is a command line
        return 1
