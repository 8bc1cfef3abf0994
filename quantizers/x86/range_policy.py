"""Range policy for a machine: a configuration in, the one to quantize with out.

Only configurations that use all of uint8 are touched: one with activations in 0..127 is exact on every machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

from quant2e.cpu import InstructionSet
from quant2e.errors import AnnotationError
from quant2e.observers.base import ObserverBase
from quant2e.observers.measuring import HistogramObserver, PerChannelMinMaxObserver, PlaceholderObserver
from quantizers.x86.paired_ranges import AgreedHistogramObserver, AgreedPlaceholderObserver, PairedWeightObserver

RangePolicy = Literal["auto", "full", "7-bit activations", "7-bit weights"]
"""``auto``: all bits where the machine multiplies them exactly, else what costs least accuracy, per layer. The others
say what to do everywhere; ``full`` saturates on machines without VNNI."""

SEVEN_BITS = 127
_AGREED: dict[type[ObserverBase], type[ObserverBase]] = {
    HistogramObserver: AgreedHistogramObserver,
    PlaceholderObserver: AgreedPlaceholderObserver,
    PerChannelMinMaxObserver: PairedWeightObserver,
}


def check_policy(policy: str) -> None:
    """Raise `AnnotationError` for a policy that does not exist."""
    if policy not in get_args(RangePolicy):
        known = ", ".join(repr(name) for name in get_args(RangePolicy))
        raise AnnotationError(f"range_policy={policy!r}: choose one of {known}")


def largest_activation(config: Any) -> int:
    """The largest integer of the activations of a configuration."""
    top = config.input_activation.quant_max
    return 255 if top is None else int(top)


def ranged(config: Any, policy: str, isa: InstructionSet) -> Any:
    """``config`` with the ranges that ``policy`` asks for on ``isa``."""
    if largest_activation(config) <= SEVEN_BITS:
        return config
    kind = applied(config, policy, isa)
    if kind == "7-bit activations":
        return _with(config, activation={"quant_min": 0, "quant_max": SEVEN_BITS})
    if kind == "7-bit weights":
        return _with(config, weight={"quant_min": -64, "quant_max": 63})
    if kind == "auto":
        specs = {"activation": config.input_activation, "weight": config.weight}
        return _with(config, **{n: {"observer_or_fake_quant_ctr": _agreed(spec)} for n, spec in specs.items()})
    return config


def applied(config: Any, policy: str, isa: InstructionSet) -> str:
    """The policy that `ranged` follows. What cannot be measured after calibration gets 7-bit activations."""
    if policy != "auto":
        return policy
    if not isa.saturates:
        return "full"
    specs = (config.input_activation, config.weight)
    measurable = not config.is_qat and all(_agreed(spec) is not None for spec in specs)
    return "auto" if measurable else "7-bit activations"


def note(config: Any, policy: str, isa: InstructionSet) -> str:
    """What a configuration's range is on a machine, and why."""
    top = largest_activation(config)
    if top <= SEVEN_BITS:
        return f"activations use 0..{top}, as configured: int8 kernels are exact with them on every machine"
    kind = applied(config, policy, isa)
    why = f"int8 kernels add two products in 16 bits on {isa.name}, where a full range would overflow"
    if kind == "auto":
        return f"{why}: each layer uses the range that costs it least, noted per layer after calibration"
    if kind == "full" and isa.saturates:
        return (
            f"WARNING: activations use 0..{top}, and the int8 kernels saturate on {isa.name}: results may be wrong "
            "there; range_policy='auto' is exact"
        )
    if kind == "full":
        return f"activations use 0..{top}: {isa.name} multiplies full ranges exactly"
    return f"{kind}" + (f": {why}" if policy == "auto" else f", as range_policy says, on {isa.name}")


def _agreed(spec: Any) -> Any:
    """The observer of a spec, made to agree with others; None for one that cannot."""
    factory = spec.observer_or_fake_quant_ctr
    partial = getattr(factory, "p", factory)
    made, options = getattr(partial, "func", partial), getattr(partial, "keywords", {})
    agreed = _AGREED.get(made)
    return None if agreed is None else agreed.with_args(**options)


def _with(config: Any, activation: dict[str, Any] | None = None, weight: dict[str, Any] | None = None) -> Any:
    changed = replace(config.input_activation, **activation) if activation else config.input_activation
    output = None if config.output_activation is None else replace(config.output_activation, **(activation or {}))
    return replace(
        config,
        input_activation=changed,
        output_activation=output,
        weight=replace(config.weight, **weight) if weight else config.weight,
    )
