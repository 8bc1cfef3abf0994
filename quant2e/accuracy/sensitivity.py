"""Sensitivity: what each group of ops costs at the output, from one calibration.

    sqnr_db_alone      only this group quantized: low where it hurts
    sqnr_db_without    all but this group quantized: high where leaving it float helps

Two methods. ``"toggle"`` evaluates the simulated graph twice a group. ``"gradient"`` takes one backward pass: with
random signs v on the output y, and δ what a group changes of its own results on exact operands,

    E (⟨∂(v·y)/∂op, δ⟩)² = ‖J δ‖²        (Hutchinson 1990)

to first order, an estimate of the noise at the output for every group at once, from as many draws as there are samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from quant2e.accuracy.op_groups import OpGroup, op_groups, rounded_without
from quant2e.accuracy.output_error import powers
from quant2e.accuracy.output_evaluation import OutputEvaluation
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.annotation.quantizer import Quantizer
from quant2e.calibration.batches import check_batch, check_count, check_iterable
from quant2e.calibration.feed import Feed, Transform
from quant2e.calibration.held_out import calibrate_but_some
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.inputs import flat_inputs
from quant2e.graph.captured.module import check_dtypes
from quant2e.graph.effects import is_random, writes
from quant2e.isolation import IsolatedRandomness
from quant2e.observers.base import is_observer_call
from quant2e.page.render import ShownOnAPage
from quant2e.page.section import DotChart, PageSection
from quant2e.prepare.prepare import prepare_pt2e
from quant2e.ranges.sqnr import sqnr_db
from quant2e.report.html import html_table
from quant2e.report.plain_data import plain_data
from quant2e.report.record import record_of
from quant2e.report.summary import summary
from quant2e.stages import stage

SensitivityMethod = Literal["toggle", "gradient"]

_EVALUATED_ON = 2
"""Held-out batches on which groups are evaluated, unless the caller says more."""

_DRAWS = 8
"""Random signs for each item of data, at least: one for each sample of a batch, and the rest by further passes."""

_SHOWN = 10
_DRAWN = 40
_HEADERS = ("ops", "modules", "alone, dB", "without, dB")


@dataclass(frozen=True, slots=True)
class GroupSensitivity:
    """One group of ops that are quantized or left float together.

    ``ops``: names of their nodes, in graph order; ``modules``: paths of their modules. ``sqnr_db_alone``: SQNR in dB at
    the output with only this group quantized; ``sqnr_db_without``: with all but this one, None where it was not
    evaluated (by gradient).
    """

    ops: tuple[str, ...]
    modules: tuple[str, ...]
    sqnr_db_alone: float
    sqnr_db_without: float | None = None

    def __str__(self) -> str:
        name = ", ".join(self.ops[:3]) + (f" and {len(self.ops) - 3} more" if len(self.ops) > 3 else "")
        place = f" [{', '.join(self.modules[:2])}]" if self.modules else ""
        without = "" if self.sqnr_db_without is None else f", {self.sqnr_db_without:.1f} dB without"
        return f"{name}{place}: {self.sqnr_db_alone:.1f} dB alone{without}"


@dataclass(frozen=True, slots=True, repr=False)
class Sensitivity(ShownOnAPage):
    """``rows``: groups, the costliest first; ``sqnr_db``: with all of them quantized, on ``batches`` items of data.

    ``notes``: what was left out, and why.
    """

    PAGE_TITLE: ClassVar[str] = "Sensitivity"

    rows: tuple[GroupSensitivity, ...]
    sqnr_db: float
    batches: int
    method: str
    notes: tuple[str, ...] = ()

    def of(self, op: str) -> GroupSensitivity:
        """The group that an op is in, by the name of its node. Raises KeyError when it is in none."""
        for row in self.rows:
            if op in row.ops:
                return row
        raise KeyError(op)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        found: dict[str, Any] = plain_data(self)
        return found

    def _head(self) -> str:
        counted = f"{self.batches} batch{'es' if self.batches != 1 else ''}"
        groups = f"{len(self.rows)} groups, {self.sqnr_db:.1f} dB with all of them"
        return f"Sensitivity ({self.method}): {groups}, on {counted}"

    def __str__(self) -> str:
        return "\n".join([self._head(), *(f"  {row}" for row in self.rows), *(f"note: {note}" for note in self.notes)])

    def __repr__(self) -> str:
        lines = [self._head(), *map(str, self.rows[:_SHOWN])]
        if (left := len(self.rows) - _SHOWN) > 0:
            lines.append(f"… {left} more groups")
        return summary(lines, self.notes)

    def _repr_html_(self) -> str:
        cells = [
            (", ".join(r.ops), ", ".join(r.modules), _cell(r.sqnr_db_alone), _cell(r.sqnr_db_without))
            for r in self.rows
        ]
        return html_table(_HEADERS, cells, self._head())

    def page_sections(self) -> tuple[PageSection, ...]:
        """What each group costs: a chart of the costliest, and a table of all."""
        worst = self.rows[:_DRAWN]
        chart = DotChart(
            title="groups of ops, the costliest first",
            unit="SQNR of the output, dB",
            names=tuple(row.ops[0] for row in worst),
            series={
                "only this one quantized": tuple(row.sqnr_db_alone for row in worst),
                **(
                    {"all but this one": tuple(row.sqnr_db_without or 0.0 for row in worst)}
                    if all(row.sqnr_db_without is not None for row in worst)
                    else {}
                ),
            },
        )
        section = PageSection(
            title="Sensitivity",
            lines=(self._head(), *(f"note: {note}" for note in self.notes)),
            headers=_HEADERS,
            rows=tuple((", ".join(r.ops), ", ".join(r.modules), r.sqnr_db_alone, r.sqnr_db_without) for r in self.rows),
            charts=(chart,) if worst else (),
            data=self.as_dict(),
        )
        return (section,)


def _cell(sqnr: float | None) -> str:
    return "" if sqnr is None else f"{sqnr:.1f}"


@stage("sensitivity")
def sensitivity(
    model: nn.Module | ExportedProgram | GraphModule,
    example_inputs: Any = None,
    quantizer: Quantizer | None = None,
    data: Iterable[Any] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    method: SensitivityMethod = "toggle",
    transform: Transform | None = None,
    num_batches: int | None = _EVALUATED_ON,
) -> Sensitivity:
    """What each group of ops costs at the output: fused ops, and those that share a scale or a weight, are one group.

    ``model``: what `quant2e.quantize` takes, with ``example_inputs``, ``quantizer`` and ``data``: it is captured,
    prepared and calibrated once, on all of ``data`` but a few held-out batches; or a graph that is calibrated already,
    and ``data`` is what it is evaluated on, in any form that `quant2e.calibrate` takes, with ``transform``.
    ``num_batches``: how many items of data each group is evaluated on, None for all.
    ``method``: ``"toggle"`` takes two evaluations a group, ``"gradient"`` one backward pass for each item of data (some
    more for batches of few samples), for hundreds of groups: a first-order estimate, from random signs, within a few
    dB, that takes samples of a batch for independent. The model is left as it is.

    Raises `Quant2eError` where nothing is quantized, the arguments do not fit together, or, by gradient, no output can
    be differentiated, and the errors of capture, prepare and calibrate.
    """
    if method not in get_args(SensitivityMethod):
        raise Quant2eError(f"method={method!r}: one of {', '.join(get_args(SensitivityMethod))}")
    check_count(num_batches)
    check_iterable(data, "data")
    if quantizer is None:
        prepared = _prepared(model, example_inputs)
        feed = Feed(data, prepared, transform=transform)
        calls = [check_batch(call, f"batch {i}", prepared) for i, call in enumerate(islice(feed, num_batches))]
        notes = feed.notes
    else:
        captured = capture(model, example_inputs, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
        prepared = prepare_pt2e(captured, quantizer)
        held_out = calibrate_but_some(prepared, data, transform=transform)
        calls, notes = held_out.calls[:num_batches], held_out.notes
    if not calls:
        raise CalibrationError("sensitivity needs at least one batch of data")
    for call in calls:
        check_dtypes(prepared, call)
    simulated = SimulatedGraph(prepared)
    groups = op_groups(simulated, record_of(prepared).report)
    if not groups:
        raise Quant2eError("no op of this model is quantized: there is nothing to measure")
    evaluate = OutputEvaluation(simulated, calls)
    whole = evaluate.sqnr(rounded_without(groups, ()))
    rows = _by_gradient(simulated, groups, calls) if method == "gradient" else _by_toggling(evaluate, groups)
    rows = sorted(rows, key=lambda row: row.sqnr_db_alone)
    notes += (_BODIES,) if simulated.float_bodies else ()
    return Sensitivity(tuple(rows), whole, len(calls), method, notes)


_BODIES = "the bodies of loops and branches stay float here: what is quantized in them is in no group"


def _prepared(model: Any, example_inputs: Any) -> GraphModule:
    if not isinstance(model, GraphModule) or not any(is_observer_call(node) for node in model.graph.nodes):
        raise Quant2eError(
            "sensitivity takes a model with example_inputs, a quantizer and data, or a calibrated graph that "
            "prepare_pt2e returned, with data="
        )
    if example_inputs is not None:
        raise Quant2eError("a calibrated graph needs no example_inputs: pass the data as data=")
    return model


def _by_toggling(evaluate: OutputEvaluation, groups: Sequence[OpGroup]) -> list[GroupSensitivity]:
    return [
        GroupSensitivity(
            group.ops,
            group.modules,
            evaluate.sqnr(group.points),
            evaluate.sqnr(rounded_without(groups, (group,))),
        )
        for group in groups
    ]


def _by_gradient(simulated: SimulatedGraph, groups: Sequence[OpGroup], calls: Sequence[Call]) -> list[GroupSensitivity]:
    signal, noise = 0.0, dict.fromkeys(groups, 0.0)
    run = _Changes(simulated, groups)
    simulated.start_again()
    generator = torch.Generator().manual_seed(0)
    for call in calls:
        outputs = run.outputs(call)
        signal += math.fsum(powers(y, y)[0] for y in outputs)
        samples = outputs[0].shape[0] if outputs[0].dim() else 1
        passes = max(1, -(-_DRAWS // max(samples, 1)))
        for _ in range(passes):
            run.differentiate(outputs, generator)
            for group in groups:
                noise[group] += run.noise(group, samples) / passes
    return [GroupSensitivity(group.ops, group.modules, sqnr_db(signal, noise[group])) for group in groups]


class _Changes(Interpreter):
    """Runs the float graph with gradients; of every op in a group, keeps its result and what rounding changes of it."""

    def __init__(self, simulated: SimulatedGraph, groups: Sequence[OpGroup]) -> None:
        super().__init__(simulated.graph)
        self._simulated = simulated
        self._group = {node: group for group in groups for node in group.nodes}
        self._found: dict[Node, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[Node, Tensor | None] = {}

    def outputs(self, call: Call) -> list[Tensor]:
        """The float outputs of one item of data that depend on some group. Raises `Quant2eError` when none does."""
        self._found.clear()
        inputs = flat_inputs(self._simulated.graph, call.copied())
        with torch.enable_grad(), IsolatedRandomness():
            leaves = pytree.tree_leaves(self.run(*inputs, enable_io_processing=False))
        found = [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point() and y.requires_grad]
        if not found:
            raise Quant2eError(
                "no float output of this model can be differentiated by its quantized ops: use method='toggle', or "
                "return what comes before the index"
            )
        return found

    def differentiate(self, outputs: Sequence[Tensor], generator: torch.Generator) -> None:
        """Gradients of the outputs under random signs; parameters, which are the model's, get none."""
        summed = []
        for y in outputs:
            signs = torch.randint(0, 2, y.shape, generator=generator).to(y).mul(2).sub(1)
            summed.append((torch.where(torch.isfinite(y), y, 0.0) * signs).sum())
        results = [result for result, _ in self._found.values()]
        try:
            found = torch.autograd.grad(torch.stack(summed).sum(), results, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise Quant2eError(f"this model cannot be differentiated, use method='toggle': {error}") from error
        self._gradients = dict(zip(self._found, found, strict=True))

    def noise(self, group: OpGroup, samples: int) -> float:
        """Estimated noise at the output: one draw for each sample of the batch, where results keep the batch apart."""
        parts = [
            gradient.double() * self._found[node][1].detach().double()
            for node in group.nodes
            if (gradient := self._gradients.get(node)) is not None
        ]
        if all(part.dim() and part.shape[0] == samples for part in parts):
            draws = [part.flatten(1).sum(1) if part.dim() > 1 else part for part in parts]
        else:
            draws = [part.sum().reshape(1) for part in parts]
        return float(torch.stack(draws).sum(0).square().sum()) if draws else 0.0

    def run_node(self, n: Node) -> Any:
        """The float value of ``n``."""
        result = super().run_node(n)
        if n in self._group and isinstance(result, Tensor) and result.is_floating_point():
            if not result.requires_grad:  # nothing before it is differentiated
                result = result.detach().requires_grad_()
            self._found[n] = (result, self._changed(n, self._group[n], result) - result.detach())
        return result

    def _changed(self, n: Node, group: OpGroup, result: Tensor) -> Tensor:
        """The result with what the group rounds of the op's operands, and of its result."""
        points = self._simulated.points
        before = {x: self.env[x] for x in n.all_input_nodes}
        mine = [] if is_random(n) or writes(n) else [x for x in before if x in points and x in group.points]
        with torch.no_grad():
            self.env.update({x: points[x].rounded(before[x]) for x in mine})
            try:
                changed = super().run_node(n) if mine else result
            finally:
                self.env.update(before)
            behind = next((user for user in n.users if user in points and user in group.points), None)
            rounded: Tensor = changed if behind is None else points[behind].rounded(changed)
        return rounded
