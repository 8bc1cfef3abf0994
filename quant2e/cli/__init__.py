"""The command line ``quant2e``: one file per verb, which reads its arguments first and imports torch after that."""

from quant2e.cli.verbs import main

__all__ = ["main"]
