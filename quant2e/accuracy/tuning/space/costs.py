"""Costs: what each group of ops loses under each alternative, and what it spends, measured before the first trial.

Loss is the noise at the output, relative to the signal, with only this group quantized (`quant2e.sensitivity`), or for
strategy ``"mse"`` the error of the group's own results; the noise of several groups adds up. What a program pays is

    work = (MACs outside of int8) / MACs + bytes / (4 · float bytes) + (float ops) / (64 · ops)

The first term is what integer kernels save, the second what weights save where activations stay float anyway, and the
last keeps an op without products (an addition) in integers unless floats are worth something there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch.fx import GraphModule, Node

from quant2e.accuracy.compare import compare
from quant2e.accuracy.sensitivity import sensitivity
from quant2e.accuracy.tuning.space.space import FLOAT_PICK, Alternative, Family, Mix, Space, TunedGroup, float_graph
from quant2e.annotation.plan import Edge
from quant2e.convert.convert import converted_graph
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.graph.constants import Constants
from quant2e.graph.fake_values import node_tensor
from quant2e.observers.encodings import (
    DynamicEncoding,
    Encoding,
    Float16Encoding,
    PerChannelEncoding,
    PerGroupEncoding,
    PerTensorEncoding,
    encode,
)
from quant2e.report.report import DYNAMIC, STATIC
from quant2e.stages import stage

Loss = Literal["output", "own"]
"""Where the error of a group is looked at: at the model's output, or at its own results."""

MEASURED_ON = 2
"""Held-out batches on which losses are measured."""

_MANY = 100
"""Groups from which on losses are estimated by gradient, in one backward pass, instead of two evaluations each."""

_WORST = 1e6
"""Relative noise of what has no finite error: a million times the signal."""


@dataclass(frozen=True, slots=True)
class Option:
    """One pick for one group. ``loss``: relative noise power; ``work``: see above; ``macs``: those in int8;
    ``size``: bytes of its constants as the graph holds them; ``bits``: of its weights, without scales.
    """

    loss: float
    work: float
    macs: int
    size: float
    bits: float


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """``options``: by family, group and pick. ``macs``, ``weights``, ``rest``: multiply-accumulates of the model,
    values in weights that may be quantized, and bytes of everything else. ``notes``: what could not be measured.
    """

    options: tuple[tuple[Mapping[str, Option], ...], ...]
    macs: int
    weights: int
    rest: float
    notes: tuple[str, ...] = field(default=())

    def _picked(self, mix: Mix) -> Iterator[Option]:
        for options, pick in zip(self.options[mix.family], mix.picks, strict=True):
            yield options[pick]

    def loss(self, mix: Mix) -> float:
        """Predicted noise power at the output, relative to the signal."""
        return math.fsum(option.loss for option in self._picked(mix))

    def work(self, mix: Mix) -> float:
        """What the mix spends, in shares of the float model: lower is cheaper."""
        return math.fsum(option.work for option in self._picked(mix))

    def size(self, mix: Mix) -> float:
        """Predicted bytes of parameters and buffers."""
        return self.rest + math.fsum(option.size for option in self._picked(mix))

    def int8_share(self, mix: Mix) -> float:
        """Share of the multiply-accumulates on int8; 0 for a model without any."""
        return sum(option.macs for option in self._picked(mix)) / self.macs if self.macs else 0.0

    def bits_per_weight(self, mix: Mix) -> float:
        """Mean bits of the weights that some alternative quantizes; 32 for a model without any."""
        bits = math.fsum(option.bits for option in self._picked(mix))
        return bits / self.weights if self.weights else 32.0


@stage("measure what each group costs")
def measured_costs(space: Space, calls: Sequence[Call], loss: Loss) -> Costs:
    """The costs of every pick. ``calls``: held-out data; ``loss``: where errors are looked at."""
    notes: dict[str, None] = {}
    report = space.families[0].alternatives[0].report
    macs = sum(verdict.op.macs for verdict in report.verdicts)
    ops = max(1, len({op for family in space.families for group in family.groups for op in group.ops}))
    table = []
    weights, rest = 0, 0.0
    for number, family in enumerate(space.families):
        losses = {a.name: _losses(a, calls, loss, notes) for a in family.alternatives}
        held = _Weights(family)
        if number == 0:
            weights, rest = held.values, max(0.0, report.float_bytes - sum(held.float_bytes(g) for g in family.groups))
        rows = []
        for group in family.groups:
            row = {}
            for pick in group.choices:
                size, bits = held.of(group, pick)
                made = _macs(family, group, pick)
                wanted = sum(report_macs for report_macs in _all_macs(family, group))
                work = (wanted - made) / macs if macs else 0.0
                work += size / (4.0 * report.float_bytes) if report.float_bytes else 0.0
                work += len(group.ops) / (64.0 * ops) if pick == FLOAT_PICK else 0.0
                noise = 0.0 if pick == FLOAT_PICK else math.fsum(losses[pick].get(op, 0.0) for op in group.ops)
                row[pick] = Option(noise, work, made, size, bits)
            rows.append(row)
        table.append(tuple(rows))
    return Costs(tuple(table), macs, weights, rest, tuple(notes))


def _all_macs(family: Family, group: TunedGroup) -> Iterator[int]:
    report = family.alternatives[0].report
    return (verdict.op.macs for verdict in report.verdicts if verdict.op.name in group.ops)


def _macs(family: Family, group: TunedGroup, pick: str) -> int:
    """Multiply-accumulates that the group runs on quantized activations and weights."""
    if pick == FLOAT_PICK:
        return 0
    verdicts = family.by_name[pick].report.verdicts
    return sum(v.op.macs for v in verdicts if v.op.name in group.ops and v.kind in (STATIC, DYNAMIC))


def _losses(alternative: Alternative, calls: Sequence[Call], loss: Loss, notes: dict[str, None]) -> Mapping[str, float]:
    """Relative noise by op; the noise of a group stands at its first op."""
    if loss == "output":
        try:
            many = len(alternative.report.verdicts) > _MANY
            method: Literal["toggle", "gradient"] = "gradient" if many else "toggle"
            rows = sensitivity(alternative.prepared, data=list(calls), method=method, num_batches=None).rows
            return {row.ops[0]: _noise(row.sqnr_db_alone) for row in rows}
        except CalibrationError:
            raise
        except Quant2eError as error:
            notes[f"errors are not measured at the output, but where they are made: {error}"] = None
    return _own_losses(alternative, calls)


def _own_losses(alternative: Alternative, calls: Sequence[Call]) -> Mapping[str, float]:
    """Relative error of each op's own result, on exact operands."""
    rows = compare(alternative.prepared, converted_graph(alternative.prepared), list(calls)).rows
    return {row.op: _noise(row.local_sqnr_db) for row in rows}


def _noise(sqnr: float | None) -> float:
    if sqnr is None or sqnr == math.inf:
        return 0.0
    return _WORST if math.isnan(sqnr) else min(10.0 ** (-sqnr / 10.0), _WORST)


class _Weights:
    """The constants that each group reads, once for all, and what becomes of them under each alternative."""

    def __init__(self, family: Family) -> None:
        self._family = family
        graph: GraphModule = float_graph(family.alternatives[0].prepared)
        constants = Constants(graph.graph)
        self._read: dict[str, list[Node]] = {}
        seen: set[Node] = set()
        for node in graph.graph.nodes:
            index = family.group_of.get(node.name)
            for source in node.all_input_nodes if index is not None else ():
                if source in constants and source not in seen and node_tensor(source) is not None:
                    seen.add(source)
                    self._read.setdefault(family.groups[index or 0].name, []).append(source)
        self._encodings = {a.name: _encodings(a) for a in family.alternatives}
        self._weights = {
            node.name
            for nodes in self._read.values()
            for node in nodes
            if any(self._is_weight(a, node) for a in family.alternatives)
        }

    def _is_weight(self, alternative: Alternative, node: Node) -> bool:
        return isinstance(self._encodings[alternative.name].get(node.name), _INTEGERS)

    @property
    def values(self) -> int:
        """How many values the weights have."""
        return sum(_count(n) for nodes in self._read.values() for n in nodes if n.name in self._weights)

    def float_bytes(self, group: TunedGroup) -> float:
        """Bytes of the group's constants in the float model."""
        return sum(_count(node) * _item_size(node) for node in self._read.get(group.name, ()))

    def of(self, group: TunedGroup, pick: str) -> tuple[float, float]:
        """Bytes of the group's constants, and bits of those that are weights."""
        size = bits = 0.0
        for node in self._read.get(group.name, ()):
            count = _count(node)
            encoding = None if pick == FLOAT_PICK else self._encodings[pick].get(node.name)
            wide = _bits(encoding, 8.0 * _item_size(node))
            if isinstance(encoding, _INTEGERS):
                size += count * encoding.dtype.itemsize + _parameter_bytes(encoding)
            else:
                size += count * _item_size(node)
            bits += count * wide if node.name in self._weights else 0.0
        return size, bits


_INTEGERS = (PerTensorEncoding, PerChannelEncoding, PerGroupEncoding)


def _encodings(alternative: Alternative) -> Mapping[str, Encoding | None]:
    """What becomes of the tensors that ops read, by name."""
    found: dict[str, Encoding | None] = {}
    for group, name in zip(alternative.plan.groups, alternative.record.observers, strict=True):
        tensors = [point.src for point in group.points if isinstance(point, Edge)]
        if name and tensors:
            try:
                encoding = encode(alternative.prepared.get_submodule(name))
            except CalibrationError:
                continue
            found.update(dict.fromkeys(tensors, encoding))
    return found


def _count(node: Node) -> int:
    tensor = node_tensor(node)
    return 0 if tensor is None else int(tensor.numel())


def _item_size(node: Node) -> int:
    tensor = node_tensor(node)
    return 0 if tensor is None else tensor.dtype.itemsize


def _parameter_bytes(encoding: Encoding) -> int:
    if isinstance(encoding, PerChannelEncoding | PerGroupEncoding):
        return sum(t.numel() * t.element_size() for t in (encoding.scale, encoding.zero_point))
    return 0


def _bits(encoding: Encoding | None, floats: float) -> float:
    """Bits of a value: as many as the integers in use need."""
    if isinstance(encoding, Float16Encoding):
        return 16.0
    if isinstance(encoding, (*_INTEGERS, DynamicEncoding)):
        return float(math.ceil(math.log2(encoding.quant_max - encoding.quant_min + 1)))
    return floats
