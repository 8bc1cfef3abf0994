"""Quantization-aware training: what it adds to a prepared graph, and what conversion takes away again.

Prepare: batch norms behind a quantized weight are rewritten (`passes.train_batch_norm`), and the plan moves with them.
Convert: they are folded, the remaining ones as after calibration, and the mode is evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quant2e.annotation.plan import DerivedFrom, Edge, Group, Output, Plan, Point
from quant2e.errors import CaptureError, where
from quant2e.graph.captured.modes import set_training, training_nodes
from quant2e.graph.captured.no_grad import set_all_detached
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.control_flow import BODY
from quant2e.graph.dataflow import operand
from quant2e.observers.base import is_observer_call
from quant2e.observers.derived import DerivedObserver, is_fake_quantizer
from quant2e.observers.fake_quant import FakeQuantizeBase
from quant2e.observers.learned_fake_quant import LearnedFakeQuantizeBase
from quant2e.passes import run
from quant2e.passes.dead_code import remove_dead_code
from quant2e.passes.fold_batch_norm import fold_batch_norm
from quant2e.passes.train_batch_norm import FUSED, FusedNorm, TrainableNorm, fuse, trainable_norms, unfuse
from quant2e.report.report import FOLDED, Report


@dataclass(frozen=True, slots=True)
class Trained:
    """A plan that moved with the graph: its observers by group, and the records of the rewritten norms."""

    plan: Plan
    observers: Mapping[int, nn.Module]
    fused: tuple[FusedNorm, ...] = ()

    def computed(self, gm: GraphModule) -> frozenset[Node]:
        """Nodes of the folded weights and biases, which depend on parameters and statistics only."""
        names = {name for record in self.fused for name in (record.scaled, record.shifted)}
        return frozenset(node for node in gm.graph.nodes if node.name in names) if names else frozenset()


def train_through_norms(gm: GraphModule, plan: Plan, observers: Mapping[int, nn.Module]) -> Trained:
    """Rewrite the batch norms of ``gm`` that belong to a quantized weight, in place, and move ``plan`` with them.

    Left alone: a norm behind an op whose weight stays float, or whose own output is quantized before the norm.
    """
    pairs = [pair for pair in trainable_norms(gm) if _belongs(pair, plan)]
    shifts = [operand(pair.norm, "bias") for pair in pairs]
    readers = {pair.result.name: list(pair.result.users) for pair in pairs}
    fused = fuse(gm, pairs)
    moves: dict[Point, Point] = {}
    for record, pair, shift in zip(fused, pairs, shifts, strict=True):
        moves[Edge(record.old_weight, record.mac)] = Edge(record.scaled, record.mac)
        moves[Output(record.old_weight)] = Output(record.scaled)
        candidates = [Edge(record.old_bias, record.mac)] if record.old_bias is not None else []
        candidates += [Edge(shift.name, record.norm)] if shift is not None else []
        if (bias := next((point for point in candidates if point in plan), None)) is not None:
            moves[bias] = Edge(record.shifted, record.mac)
        result = pair.result.name
        moves[Output(result)] = Output(record.mac)
        moves |= {Edge(result, reader.name): Edge(record.mac, reader.name) for reader in readers[result]}
    computed = frozenset(name for record in fused for name in (record.scaled, record.shifted))
    plan, observers = _moved(plan, observers, moves, computed)
    return Trained(plan, observers, fused)


def _belongs(pair: TrainableNorm, plan: Plan) -> bool:
    weight, between = operand(pair.mac, "weight"), [pair.mac]
    while between[-1] is not pair.result:
        between += between[-1].users
    own = Edge(weight.name, pair.mac.name) in plan or (Output(weight.name) in plan and len(weight.users) == 1)
    inside: list[Point] = [
        *(Output(node.name) for node in between[:-1]),
        *(Edge(a.name, b.name) for a, b in pairwise(between)),
    ]
    return own and not any(point in plan for point in inside)


def _moved(
    plan: Plan, observers: Mapping[int, nn.Module], moves: Mapping[Point, Point], computed: frozenset[str]
) -> tuple[Plan, Mapping[int, nn.Module]]:
    """``plan`` with its points moved. What was one tensor and is several ``computed`` ones now gets a group, and an
    observer, for each.
    """
    groups: list[Group] = []
    made: dict[int, nn.Module] = {}
    extra: list[tuple[Group, nn.Module]] = []
    for index, group in enumerate(plan.groups):
        parts: dict[str, list[Point]] = {}
        for point in group.points:
            new = moves.get(point, point)
            parts.setdefault(new.tensor if new.tensor in computed else "", []).append(new)
        first, *others = parts.values()
        spec = group.spec
        if isinstance(spec, DerivedFrom):
            spec = replace(spec, sources=tuple(moves.get(source, source) for source in spec.sources))
        groups.append(Group(spec, tuple(first)))
        if index in observers:
            made[index] = observers[index]
            extra += [(Group(spec, tuple(points)), copy.deepcopy(observers[index])) for points in others]
    for group, observer in extra:
        made[len(groups)] = observer
        groups.append(group)
    plan = Plan(tuple(groups), plan.ignored)
    for index, observer in made.items():
        spec = plan.groups[index].spec
        if isinstance(observer, DerivedObserver) and isinstance(spec, DerivedFrom):
            sources = [plan.group_of(source) for source in spec.sources]
            observer.sources = [made[source] for source in sources if source is not None]
    return plan, made


def ready_to_learn(observers: Mapping[int, nn.Module]) -> None:
    """Give learned scales their parameters, so that an optimizer that is built now knows them."""
    for observer in observers.values():
        if isinstance(observer, LearnedFakeQuantizeBase):
            observer.allocate()


def training_report(report: Report, trained: Trained, gm: GraphModule) -> Report:
    """``report`` with what becomes of batch norms at conversion. ``gm``: the observed graph."""
    into = {record.norm: record.mac for record in trained.fused}
    verdicts = tuple(
        replace(v, kind=FOLDED, reason=f"into {into[v.op.name]}, at conversion") if v.op.name in into else v
        for v in report.verdicts
    )
    notes = []
    if BODY not in gm.meta and not any(map(is_fake_quantizer, gm.modules())):
        notes.append(
            "WARNING: nothing is fake-quantized, so training is float training; use a configuration with is_qat=True"
        )
    return replace(report, verdicts=verdicts).with_notes(notes)


# ---------------------------------------------------------------- conversion


def end_training(gm: GraphModule) -> list[str]:
    """Turn the copy of a trained graph into one as calibration leaves it, in place; notes for the report.

    Raises `CaptureError` for ops in training mode other than the batch norms that are folded here.
    """
    fused: tuple[FusedNorm, ...] = gm.meta.pop(FUSED)
    norms = {record.norm for record in fused}
    behaving = list(training_nodes(gm))
    others = [node for node in behaving if node.name not in norms]
    if others:
        listed = "\n".join(f"  {where(node)}" for node in others[:5])
        more = f"\n  and {len(others) - 5} more" if len(others) > 5 else ""
        raise CaptureError(
            "conversion makes the model that is deployed, and this one is in training mode: call "
            f"prepared.eval(), or move_exported_model_to_eval(prepared), first. In training mode:\n{listed}{more}"
        )
    set_all_detached(gm, False)
    for module in gm.modules():
        module.training = False
        if isinstance(module, GraphModule):
            set_training(module.graph, False)
    unfuse(gm, fused)
    run(gm, (remove_dead_code, fold_batch_norm), compiled=False)
    _measure_again(gm)
    if not behaving:
        return []
    return ["converted in training mode: batch norms were folded by their running statistics, as in evaluation"]


def _measure_again(gm: GraphModule) -> None:
    """Show constants to the observers that were frozen on them before training, which changed them.

    Fake-quantizers followed the training; what calibrates (a module with a configuration that is not for training) did
    not.
    """
    constants = Constants(gm.graph)
    seen: dict[str, list[Node]] = {}
    for call in gm.graph.nodes:
        if is_observer_call(call):
            seen.setdefault(str(call.target), []).append(call.all_input_nodes[0])
    exchanged: dict[nn.Module, nn.Module] = {}
    for name, tensors in seen.items():
        observer: Any = gm.get_submodule(name)
        plain = callable(getattr(observer, "reset_min_max_vals", None)) and not isinstance(observer, FakeQuantizeBase)
        if not plain or not all(tensor in constants for tensor in tensors):
            continue
        fresh: Any = copy.deepcopy(observer)
        fresh.reset_min_max_vals()
        fresh.frozen = False
        with torch.no_grad():
            for tensor in tensors:
                fresh(evaluate(gm, tensor))
        setattr(gm, name, fresh)
        exchanged[observer] = fresh
    for observer in gm.modules():
        if isinstance(observer, DerivedObserver):
            observer.sources = [exchanged.get(source, source) for source in observer.sources]
