"""Checks of the whole flow: annotate, several times, prepare, calibrate, convert, integer reference."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation
from quant2e.convert.convert import converted_graph
from quant2e.errors import Quant2eError
from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.module import copy_graph
from quant2e.integer import integer_report, to_integer
from quant2e.passes import run
from quant2e.passes.fold_batch_norm import fold_batch_norm
from quant2e.prepare.prepare import prepare_pt2e
from quantizers.conformance import (
    annotation_checks as annotated,
)
from quantizers.conformance import (
    isolation_checks,
)
from quantizers.conformance import (
    numeric_checks as numbers,
)
from quantizers.conformance.program import Program
from quantizers.conformance.report import Finding
from quantizers.kit.explanation import APPLIED, Trials
from quantizers.kit.printer import annotations_text


@dataclass(frozen=True, slots=True)
class Limits:
    """``min_sqnr_db``: of the results against float. ``requantization``: of the integer reference, None leaves it out;
    ``strict``: every quantized op must have an integer form. ``mixes``: several quantizers may meet at a tensor.
    """

    min_sqnr_db: float
    requantization: Any
    strict: bool
    mixes: bool


@dataclass(slots=True)
class Outcome:
    """What one program showed. ``reached``: rule → how many of its matches were annotated. ``weighted``: (rule, op) of
    ops with an integer weight → whether the activation is quantized, each seen way. ``refused``: rule → why it was not
    applied.
    """

    findings: list[Finding] = field(default_factory=list)
    reached: Counter[str] = field(default_factory=Counter)
    weighted: dict[tuple[str, str], dict[bool, str]] = field(default_factory=dict)
    refused: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    ran: bool = False


def examine(quantizer: Quantizer, program: Program, limits: Limits, seed: int) -> Outcome:
    """Run one program. Whatever the quantizer raises becomes a finding."""
    outcome = Outcome()
    model, batches = program.module(seed), program.batches(3, seed)
    wanted = _run(model, batches[2])
    try:
        captured = capture(model, _cloned(batches[0]))
    except Exception:  # noqa: BLE001  # what torch does not export says nothing about the quantizer
        return outcome
    before = {name: value.detach().clone() for name, value in captured.state_dict().items()}
    code = captured.code
    try:
        outcome.ran = True
        made = _annotate(quantizer, captured, batches[0], outcome)
        if made is not None:
            _look(made, limits, outcome)
            _refusals(quantizer, outcome)
        if _sound(outcome):
            _flow(quantizer, captured, batches, wanted, limits, outcome)
            _neighbours(quantizer, captured, outcome)
    finally:
        changed = [name for name, value in captured.state_dict().items() if not _same(value, before[name])]
        if changed or captured.code != code:
            what = f"'{changed[0]}'" if changed else "the captured graph"
            outcome.findings.append(Finding("model changed", f"{what} is not as it was before the quantizer ran"))
            captured.load_state_dict(before)
    return outcome


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _cloned(batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies: a program may write to its inputs."""
    return tuple(tensor.clone() for tensor in batch)


def _run(model: Any, batch: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*_cloned(batch))) if isinstance(leaf, Tensor)]


def _sound(outcome: Outcome) -> bool:
    """Whether the graph can be run: what is wrong so far would only raise again, in other words."""
    return all(f.kind in _HARMLESS for f in outcome.findings)


_HARMLESS = frozenset(
    {"integer tensor", "mask", "isolated", "requantized", "mismatched scales", "shared across", "wrong axis"}
)


def _raised(stage: str, error: Exception) -> Finding:
    return Finding("raises", f"{stage}: {type(error).__name__}: {error}")


def _own_copy(captured: GraphModule) -> GraphModule:
    """The graph as prepare gives it to a quantizer."""
    gm = copy_graph(captured)
    run(gm, (fold_batch_norm,))
    return gm


RUNS = 4
"""So often one graph is annotated: an order of addresses may repeat once or twice."""


def _annotate(
    quantizer: Quantizer, captured: GraphModule, batch: Sequence[Tensor], outcome: Outcome
) -> GraphModule | None:
    """The annotated graph; None where that failed. Several times, to see whether it comes out the same."""
    gm = _annotate_once(quantizer, _own_copy(captured), batch, outcome, first=True)
    text = "" if gm is None else _text(gm)
    for _ in range(1, RUNS):
        if gm is None:
            break
        gm = _annotate_once(quantizer, _own_copy(captured), batch, outcome, first=False)
        if gm is not None and (other := _text(gm)) != text:
            outcome.findings.append(_differing(gm, text, other))
            break
    return gm


def _differing(gm: GraphModule, text: str, other: str) -> Finding:
    lines = zip(text.splitlines(), other.splitlines(), strict=False)
    first, second = next(((a, b) for a, b in lines if a != b), (text, other))
    node = first.partition(":")[0]
    target = next((str(n.target) for n in gm.graph.nodes if n.name == node), "")
    return Finding("not deterministic", f"two runs on one graph: `{first}`, then `{second}`", "", node, target)


def _text(gm: GraphModule) -> str:
    try:
        return annotations_text(gm)
    except Exception:  # noqa: BLE001  # annotations that cannot be printed are found to be malformed later
        return ""


def _annotate_once(
    quantizer: Quantizer, gm: GraphModule, batch: Sequence[Tensor], outcome: Outcome, *, first: bool
) -> GraphModule | None:
    stage = "transform_for_annotation"
    try:
        if callable(transform := getattr(quantizer, "transform_for_annotation", None)):
            wanted = _run(gm, batch) if first else []
            gm = transform(gm) or gm
            gm.recompile()
            if first and numbers.worst(wanted, _run(gm, batch))[0] < _EXACT_DB:
                outcome.findings.append(Finding("result changed", "the float result is another one after it"))
        stage, code = "annotate", _structure(gm)
        gm = _after_annotate(quantizer, gm)
        stage = "validate"
        if callable(validate := getattr(quantizer, "validate", None)):
            validate(gm)
    except Exception as error:  # noqa: BLE001
        outcome.findings.append(_raised(stage, error))
        return None
    if first and (after := _structure(gm)) != code:
        changed = [b for b in after if b not in code] or [a for a in code if a not in after]
        node = changed[0].partition(" = ")[0] if changed else ""
        outcome.findings.append(Finding("graph changed", f"`{changed[0] if changed else '?'}`", "", node))
    return gm


def _after_annotate(quantizer: Quantizer, gm: GraphModule) -> GraphModule:
    made: Any = quantizer.annotate(gm)  # a quantizer of another library may annotate in place and return nothing
    return made or gm


_EXACT_DB = 80.0
"""A rewrite may reorder float arithmetic, and no more."""


def _structure(gm: GraphModule) -> list[str]:
    return [f"{n.name} = {n.target}({n.args}, {n.kwargs})" for n in gm.graph.nodes]


def _look(gm: GraphModule, limits: Limits, outcome: Outcome) -> None:
    """Everything that can be seen without running."""
    a = annotated.Annotated(gm)
    _count(a, outcome)
    for look in annotated.LOOKS:
        outcome.findings += look(a)
    if not _sound(outcome):
        return
    plan, wrong = annotated.requested_plan(a)
    outcome.findings += wrong
    if plan is None:
        return
    found = [*annotated.against_plan(a, plan), *isolation_checks.isolated_ops(a, plan)]
    outcome.findings += [f for f in found if not (limits.mixes and f.kind in ("requantized", "mismatched scales"))]
    for node, quantized in isolation_checks.weight_only(a, plan):
        rule = str(getattr(node.meta.get(ANNOTATION), "rule", "") or "")
        outcome.weighted.setdefault((rule, str(node.target)), {}).setdefault(quantized, node.name)


def _count(a: annotated.Annotated, outcome: Outcome) -> None:
    for _node, note in a.notes():
        rule = getattr(note, "rule", "")
        if rule and getattr(note, "_is_output_of_quantized_pattern", True):
            outcome.reached[rule] += 1


def _refusals(quantizer: Quantizer, outcome: Outcome) -> None:
    children: Sequence[Any] = getattr(quantizer, "quantizers", (quantizer,))
    for child in children:
        for trials in child.trials.at.values() if isinstance(getattr(child, "trials", None), Trials) else ():
            for trial in trials:
                if trial.outcome != APPLIED:
                    outcome.refused[trial.rule][trial.reason] += 1


def _flow(
    quantizer: Quantizer,
    captured: GraphModule,
    batches: Sequence[Sequence[Tensor]],
    wanted: list[Tensor],
    limits: Limits,
    outcome: Outcome,
) -> None:
    """Prepare, calibrate on all batches, convert, compare with float, and with the integer reference."""
    stage = "prepare_pt2e"
    try:
        prepared = prepare_pt2e(captured, quantizer)
        rules = {
            node.name: str(getattr(node.meta.get(ANNOTATION), "rule", "") or "")
            for node in prepared.graph.nodes
            if ANNOTATION in node.meta
        }
        stage = "calibration"
        for batch in batches:
            _run(prepared, batch)
        stage = "convert_pt2e"
        converted = converted_graph(prepared)
        stage = "the quantized graph"
        found = _run(converted, batches[2])
        again = _run(converted_graph(prepared), batches[2])
    except Exception as error:  # noqa: BLE001
        outcome.findings.append(_raised(stage, error))
        return
    outcome.findings += numbers.bias_scales(converted, rules)
    if not all(map(_same, found, again)):
        outcome.findings.append(
            Finding("not deterministic", "two conversions of one calibration give different results")
        )
    level, where = numbers.worst(wanted, found)
    if level < limits.min_sqnr_db:
        node = numbers.suspects(converted, _cloned(batches[2]))
        place = ("", "", "") if node is None else (rules.get(node.name, ""), node.name, str(node.target))
        outcome.findings.append(
            Finding("sqnr", f"output {where} is {level:.1f} dB from float (at least {limits.min_sqnr_db:g})", *place)
        )
    elif limits.requantization is not None and not outcome.findings:
        _integers(converted, batches[2], found, limits, rules, outcome)


_AGREES_DB = 20.0
"""Integer reference against the Q/DQ graph: steps that flip at ties, on results of a few steps."""


def _integers(
    converted: GraphModule,
    batch: Sequence[Tensor],
    found: list[Tensor],
    limits: Limits,
    rules: dict[str, str],
    outcome: Outcome,
) -> None:
    if not rules:
        return
    try:
        integer = to_integer(converted, requantization=limits.requantization)
    except Quant2eError as error:
        if "no quantize" not in str(error):
            outcome.findings.append(Finding("integer reference", str(error)))
        return
    for verdict in integer_report(integer).left if limits.strict else ():
        outcome.findings.append(
            Finding("integer reference", verdict.reason, rules.get(verdict.name, ""), verdict.name, verdict.op)
        )
    level, where = numbers.worst(found, _run(integer, batch))
    if level < _AGREES_DB:
        outcome.findings.append(
            Finding("integer reference", f"output {where} is {level:.1f} dB from the quantized graph's")
        )


def _neighbours(quantizer: Quantizer, captured: GraphModule, outcome: Outcome) -> None:
    """Whether the quantizer leaves alone what another one has annotated: every second op that it would annotate."""
    gm = _own_copy(captured)
    try:
        if callable(transform := getattr(quantizer, "transform_for_annotation", None)):
            gm = transform(gm) or gm
        theirs = [node for node in gm.graph.nodes if node.op == "call_function"][::2]
        made: dict[Node, Any] = {}
        for node in theirs:
            made[node] = node.meta[ANNOTATION] = QuantizationAnnotation(_annotated=True)
        gm = _after_annotate(quantizer, gm)
    except Exception as error:  # noqa: BLE001
        outcome.findings.append(_raised("annotate, of a graph with annotations of another quantizer", error))
        return
    for node, note in made.items():
        now = node.meta.get(ANNOTATION)
        if now is None or now is not note or now.input_qspec_map or now.output_qspec is not None:
            done = "removed" if now is None else "changed"
            outcome.findings.append(
                Finding("annotation changed", f"it {done} what another had put on it", "", node.name, str(node.target))
            )


__all__ = ["Limits", "Outcome", "examine"]
