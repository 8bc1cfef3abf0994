"""Calls to compile ahead: sizes and example inputs, as a user names them, become calls of the program.

warm=[1, 16]                              one size varies: 1 and 16 of it
warm=[{"x.shape[0]": 1, "x.shape[1]": 7}] several vary: by name; those that are not named are the example's
warm=[torch.randn(1, 3, 8, 8)]            inputs of a call, as ``verify_inputs`` has them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lowering.inductor.source import InductorSource
from lowering.signature import Signature
from quant2e.errors import LoweringError
from quant2e.graph.captured.calls import Call, call_of


def warm_calls(warm: Iterable[Any], source: InductorSource) -> tuple[Call, ...]:
    """The calls that ``warm=`` asks for, checked as the program will check them.

    Raises `LoweringError` for what is no list, for sizes that do not exist or are out of bounds, and where no size of
    the graph varies.
    """
    if isinstance(warm, int | str | Mapping | Tensor):
        raise LoweringError(
            f"warm is a {type(warm).__name__}: give a list, of sizes or of inputs, such as warm=[1, 16]"
        )
    wanted = tuple(warm)
    if wanted and not source.signature.symbols:
        raise LoweringError(
            "warm: no size of this graph varies, so that nothing is compiled again: leave it out, or capture the model "
            "with dynamic_shapes"
        )
    return tuple(_call(each, place, source) for place, each in enumerate(wanted))


def _call(each: Any, place: int, source: InductorSource) -> Call:
    signature = source.signature
    try:
        if isinstance(each, int) and not isinstance(each, bool):
            return _resized({_only_size(signature): each}, source)
        if isinstance(each, Mapping) and each and all(type(size) is int for size in each.values()):
            if set(each) <= set(signature.size_names.values()):
                return _resized(each, source)
            if not set(each) <= {spec.name for spec in signature.inputs}:
                raise LoweringError(f"there is no size {_unknown(each, signature)}: {_named(signature)}")
        call = call_of(each)
        signature.sizes(signature.flatten(*call))
    except LoweringError as error:
        raise LoweringError(f"warm[{place}]: {error}") from error
    return call


def _resized(sizes: Mapping[str, int], source: InductorSource) -> Call:
    """The example with these sizes."""
    if source.example is None:
        raise LoweringError("sizes are set in the example inputs, and there are none: pass example_inputs")
    signature = source.signature
    values = signature.flatten(*source.example)
    names = signature.size_names.values()
    wanted = [sizes.get(name, size) for name, size in zip(names, signature.sizes(values), strict=True)]
    for name, size, (low, high) in zip(names, wanted, signature.symbols.values(), strict=True):
        if not max(low, 1) <= size <= high:
            raise LoweringError(f"{name} = {size}, and the graph was captured for {max(low, 1):g} to {high:g}")
    resized = signature.resized(values, wanted)
    signature.sizes(resized)
    return signature.structured(resized)


def _only_size(signature: Signature) -> str:
    names = list(signature.size_names.values())
    if len(names) > 1:
        raise LoweringError(f"which size is meant? {_named(signature)}: give a dict")
    return names[0]


def _unknown(sizes: Mapping[Any, int], signature: Signature) -> str:
    return ", ".join(sorted(repr(name) for name in set(sizes) - set(signature.size_names.values())))


def _named(signature: Signature) -> str:
    return "those that vary are " + ", ".join(repr(name) for name in signature.size_names.values())
