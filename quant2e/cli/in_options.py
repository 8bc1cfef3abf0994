"""Errors of the library as the command line words them: what is an argument in Python is an option here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import click

_OTHERWISE: Mapping[str, str] = {
    "relative=False": "--absolute",
    "min_sqnr_db=None": "--min-sqnr=-inf",
    "verify=False": "--no-verify",
    "dynamic_batch=True": "--dynamic-batch=N",
}
"""Arguments whose options are not called, or not set, as they are."""

_ARGUMENTS = frozenset({"algorithms", "evaluate", "max_drop", "max_trials", "method", "storage", "strategy", "timeout"})
"""Arguments whose options have their names. A text of the user's code that has one of them is not changed by much."""


def in_options(text: str, params: Iterable[click.Parameter]) -> str:
    """``text`` with the options among ``params``, of a command, in place of the arguments that have their names.

    relative=False → --absolute      max_drop=0.02 → --max-drop=0.02      storage=, or → --storage, or
    """
    options = {str(param.name): max(param.opts, key=len) for param in params if param.param_type_name == "option"}
    for argument, option in _OTHERWISE.items():
        if option.partition("=")[0] in options.values():
            text = text.replace(argument, option)
    names = "|".join(_ARGUMENTS.intersection(options)) or "(?!)"
    return re.sub(rf"(?<![\w-])({names})=(?=(\S)?)", lambda found: _option(options[found[1]], found[2]), text)


def _option(name: str, following: str | None) -> str:
    """The option where an argument stood, which is set to something unless a space or a mark follows."""
    return name if following is None or following in ",;.:)" else f"{name}="
