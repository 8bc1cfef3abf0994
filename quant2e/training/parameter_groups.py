"""Parameter groups: the parameters of a model by name pattern, for an optimizer, each in exactly one group."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from quant2e.errors import Quant2eError
from quant2e.training.names import select_names


def parameter_groups(
    model: nn.Module, settings: Mapping[str | re.Pattern[str], Mapping[str, Any] | None]
) -> list[dict[str, Any]]:
    """The groups for ``torch.optim``: one per pattern, in order, and one of all other parameters, with its defaults.

    ``settings``: pattern (see `select_names`) → options of its group (``{"lr": 1e-4, "weight_decay": 0.0}``), or None,
    which freezes: ``requires_grad`` becomes False and the parameters are in no group. Names are those of
    ``model.named_parameters()``; a tied parameter goes by each of its names. Learned scales and clipping values are
    among them from the beginning, also while they are not trained yet.

        torch.optim.SGD(parameter_groups(prepared, {"*.alpha": {"lr": 1e-2}, "0.*": None}), lr=1e-3)

    Raises `Quant2eError`, before anything is frozen, for a pattern that names nothing, with the nearest name, for a
    parameter that two patterns name, for options that no optimizer could use (a learning rate of NaN or below 0), and
    when nothing is left to train.
    """
    _check_settings(settings)
    named = dict(model.named_parameters())
    first_names = {parameter: name for name, parameter in named.items()}
    every_name = dict(model.named_parameters(remove_duplicate=False))
    taken: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    frozen: list[str] = []
    for pattern, options in settings.items():
        names = list(dict.fromkeys(first_names[every_name[name]] for name in select_names(every_name, pattern)))
        for name in names:
            if name in taken:
                raise Quant2eError(
                    f"parameter '{name}' is named by {_text(taken[name])} and by {_text(pattern)}: an optimizer takes "
                    "each parameter once; make one of the patterns narrower"
                )
            taken[name] = pattern
        if options is None:
            frozen += names
        else:
            groups.append({"params": [named[name] for name in names], **options})
    rest = [parameter for name, parameter in named.items() if name not in taken]
    groups += [{"params": rest}] if rest else []
    if not groups:
        raise Quant2eError("every parameter is frozen: nothing is left to train")
    for name in frozen:
        named[name].requires_grad_(False)
    return groups


def _check_settings(settings: Any) -> None:
    if not isinstance(settings, Mapping):
        raise Quant2eError(f"settings is a {type(settings).__name__}: give a mapping, {{'*.bias': {{'lr': 1e-4}}}}")
    for pattern, options in settings.items():
        if not isinstance(pattern, str | re.Pattern):
            raise Quant2eError(f"{pattern!r} is no pattern: a name, a glob, or a regular expression behind 're:'")
        if options is None:
            continue
        if not isinstance(options, Mapping):
            raise Quant2eError(f"the options of {_text(pattern)} are {options!r}: give a mapping, or None to freeze")
        if "params" in options:
            raise Quant2eError(f"the options of {_text(pattern)} hold 'params', which the pattern itself says")
        for name, value in options.items():
            if (isinstance(value, float) and math.isnan(value)) or (name in _NOT_NEGATIVE and not value >= 0):
                raise Quant2eError(f"the options of {_text(pattern)} hold {name}={value!r}: 0 or larger")


_NOT_NEGATIVE = ("lr", "weight_decay", "momentum", "eps")
"""Options that optimizers refuse below 0 as defaults of all groups, and do not look at in a group."""


def _text(pattern: str | re.Pattern[str]) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)
