"""Registry: algorithms by name, made from what was asked for, with every setting checked before any work.

"equalize"    {"smooth": {"alpha": 0.5}}    Equalize()    =>    algorithms
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from quant2e.accuracy.algorithms.algorithm import Algorithm
from quant2e.accuracy.algorithms.awq import Awq
from quant2e.accuracy.algorithms.correct_bias import CorrectBias
from quant2e.accuracy.algorithms.equalize import Equalize
from quant2e.accuracy.algorithms.fit_activation_ranges import FittedActivationRanges
from quant2e.accuracy.algorithms.fit_weight_ranges import FittedWeightRanges
from quant2e.accuracy.algorithms.gptq import GPTQ
from quant2e.accuracy.algorithms.learn_biases import LearnedBiases
from quant2e.accuracy.algorithms.reestimate_batch_norm import ReestimateBatchNorm
from quant2e.accuracy.algorithms.round_adaptively import AdaptiveRounding
from quant2e.accuracy.algorithms.smooth import Smooth
from quant2e.accuracy.algorithms.smooth_sums import SmoothSums
from quant2e.errors import Quant2eError

_CLASSES: tuple[type[Algorithm], ...] = (
    Equalize,
    Smooth,
    SmoothSums,
    Awq,
    FittedActivationRanges,
    FittedWeightRanges,
    GPTQ,
    AdaptiveRounding,
    CorrectBias,
    LearnedBiases,
    ReestimateBatchNorm,
)
"""Every algorithm: a new one is one line here."""

ALGORITHMS: Mapping[str, type[Algorithm]] = {kind.name: kind for kind in _CLASSES}
"""Every algorithm by its name."""

AlgorithmItem = str | Mapping[str, Mapping[str, Any]] | Algorithm
"""How one is asked for: its name, its name with its settings, or itself."""


Algorithms = Literal["auto"] | Sequence[AlgorithmItem]
"""What is asked for: a list, or "auto", the default ladder."""


def read_algorithms(asked: Any) -> tuple[Algorithm, ...]:
    """The algorithms that ``asked``, a list of `AlgorithmItem`, names, in its order.

    Raises `Quant2eError` for a name or a setting that there is not, with the nearest one, and for a value of another
    type than the setting has.
    """
    if isinstance(asked, str | Mapping | Algorithm) or not isinstance(asked, Iterable):
        raise Quant2eError(
            f'algorithms={asked!r}: a list of names, of {{name: settings}} or of algorithms, or "auto"; '
            f"there are {', '.join(ALGORITHMS)}"
        )
    return tuple(_read(item) for item in asked)


def _read(item: Any) -> Algorithm:
    if isinstance(item, Algorithm):
        return item
    if isinstance(item, type) and issubclass(item, Algorithm):
        raise Quant2eError(f"{item.__name__} is a class; give an algorithm, {item.__name__}()")
    if isinstance(item, str):
        return make_algorithm(item, {})
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, settings),) = item.items()
        if isinstance(name, str) and (settings is None or isinstance(settings, Mapping)):
            return make_algorithm(name, settings or {})
    raise Quant2eError(
        f"{item!r} is no algorithm: give its name, or a mapping of its name to its settings with one entry, "
        '{"smooth": {"alpha": 0.5}} say'
    )


def make_algorithm(name: str, settings: Mapping[str, Any]) -> Algorithm:
    """The algorithm of that name with these settings. Raises as `read_algorithms` does."""
    if name not in ALGORITHMS:
        hint = '"auto" stands alone, not in a list' if name == "auto" else _nearest(name, ALGORITHMS)
        raise Quant2eError(f"there is no algorithm '{name}': {hint}")
    kind: Any = ALGORITHMS[name]
    hints = typing.get_type_hints(kind)
    own = {field.name: hints[field.name] for field in fields(kind) if field.init}
    for key, value in settings.items():
        if key not in own:
            raise Quant2eError(f"the algorithm '{name}' has no setting {key!r}: {_nearest(str(key), own)}")
        if not _fits(value, own[key]):
            raise Quant2eError(f"{name}: {key}={value!r} has another type than the setting, {_spelled(own[key])}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    made: Algorithm = kind(**values)
    return made


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
    there = f"there are {', '.join(known)}" if known else "there are none"
    return f"did you mean '{near[0]}'? ({there})" if near else there


def _spelled(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value, as a file holds it, is one of this type: an integer is a float, and a list a tuple."""
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in of)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in of)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, of[0]) and _fits(v, of[1]) for k, v in value.items())
    if origin is not None and issubclass(origin, Sequence | Collection):
        return isinstance(value, list | tuple) and _items_fit(value, of)
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, bool, str):
        return type(value) is hint
    return isinstance(value, types.NoneType if hint is None else hint)


def _items_fit(items: Sequence[Any], of: tuple[Any, ...]) -> bool:
    if not of or of[1:] == (Ellipsis,) or len(of) == 1:
        return all(_fits(item, of[0]) for item in items) if of else True
    return len(items) == len(of) and all(map(_fits, items, of))
