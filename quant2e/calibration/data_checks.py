"""Checks of calibration data on the float graph, before anything is quantized.

Each finding says what, where and what to do. None of them stops anything: data can be unusual for good reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from quant2e.calibration.batches import FEW_SAMPLES, check_count, check_iterable, sample_count
from quant2e.calibration.feed import Feed, Transform
from quant2e.errors import CalibrationError, where
from quant2e.graph.captured.capture import as_graph_module
from quant2e.graph.captured.inputs import flat_inputs, input_path
from quant2e.graph.mutation import own_written_tensors
from quant2e.isolation import IsolatedRandomness
from quant2e.ranges.minmax import SENTINEL
from quant2e.report.html import html_table
from quant2e.report.plain_data import plain_data
from quant2e.report.summary import summary

aten = torch.ops.aten

OWNS = 4.0
"""A batch owns a range when without it the range would be this many times smaller."""

SATURATED = 0.5
"""Part of the values at a bound of a clamp from which on it counts as saturated."""

NORMALISED = 3.0
"""Standard deviations between the mean a batch norm expects and the one it gets, and ratio of the deviations."""

_BOUNDED: dict[Any, tuple[float | None, float | None]] = {
    aten.relu.default: (0.0, None),
    aten.relu_.default: (0.0, None),
    aten.relu6.default: (0.0, 6.0),
    aten.sigmoid.default: (0.0, 1.0),
    aten.hardsigmoid.default: (0.0, 1.0),
    aten.tanh.default: (-1.0, 1.0),
}
_CLAMPS = (aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default)
_NORMS = (
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
)


@dataclass(frozen=True, slots=True)
class DataFinding:
    """``kind``: one word, for programs; ``place``: the op and the user's line; ``message``: what, and what to do."""

    kind: str
    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


@dataclass(frozen=True, slots=True, repr=False)
class DataReport:
    """What `check_data` found, in the order of the graph: iterate over it for each finding.

    ``batches`` and ``samples`` say how much data was looked at. ``str(report)`` is a line per finding, ``repr(report)``
    a summary.
    """

    findings: tuple[DataFinding, ...]
    batches: int
    samples: int

    def __iter__(self) -> Iterator[DataFinding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: plain_data(getattr(self, name)) for name in ("batches", "samples", "findings")}

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))

    def __repr__(self) -> str:
        return summary([self._headline], [str(finding) for finding in self.findings], "finding")

    def _repr_html_(self) -> str:
        rows = [(finding.kind, finding.place, finding.message) for finding in self.findings]
        return html_table(("kind", "where", "what"), rows, self._headline)

    @property
    def _headline(self) -> str:
        kinds = Counter(finding.kind for finding in self.findings)
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing found"
        return f"DataReport: {found} ({self.samples} samples in {self.batches} batches)"


def check_data(
    model: GraphModule | ExportedProgram,
    data: Iterable[Any],
    num_batches: int | None = None,
    *,
    transform: Transform | None = None,
) -> DataReport:
    """Run ``data`` through a captured float model and say what looks wrong with it.

    Found are: too few samples; non-finite values; channels that are zero throughout, or stuck at a bound of an
    activation; a single batch without which a range would be `OWNS` times smaller; inputs of batch norms that are
    not as their running statistics expect, which is how inputs look that were not normalised as in training.
    ``data`` in any form that `calibrate` takes, with ``transform``. Memory does not grow with the number of batches.
    Raises `CalibrationError` for data without a batch.
    """
    check_iterable(data, "the data")
    check_count(num_batches)
    graph = as_graph_module(model)
    own_written_tensors(graph)
    watcher = _Watcher(graph)
    randomness = IsolatedRandomness()
    done = samples = 0
    for call in islice(Feed(data, graph, transform=transform), num_batches):
        inputs = flat_inputs(graph, call)
        samples += sample_count(inputs)
        with torch.no_grad(), randomness:
            watcher.run(*inputs, enable_io_processing=False)
        done += 1
    if done == 0:
        raise CalibrationError("the data held no batch (an exhausted generator?); give it anew")
    few = []
    if samples < FEW_SAMPLES:
        text = f"only {samples} samples in {done} batches: ranges will be too narrow; about 100 are usually enough"
        few.append(DataFinding("few", "", text))
    return DataReport((*few, *watcher.findings(done)), done, samples)


@dataclass(slots=True)
class _Seen:
    """What is remembered of one tensor: the two largest magnitudes of a batch, and per channel what it reached."""

    largest: float = 0.0
    second: float = 0.0
    owner: int = 0
    non_finite: int = 0
    alive: Tensor | None = None
    stuck: Tensor | None = None
    count: int = 0


@dataclass(slots=True)
class _Moments:
    """Sums over all values of each channel, in float64."""

    count: int
    total: Tensor
    squares: Tensor


class _Watcher(Interpreter):
    """Runs the float graph and remembers a few numbers per tensor."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self._nodes = tuple(graph.graph.nodes)
        self._seen: dict[Node, _Seen] = {}
        self._norms: dict[Node, tuple[_Moments, Tensor, Tensor]] = {}
        self._batch = 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run one batch."""
        result = super().run(*args, **kwargs)
        self._batch += 1
        return result

    def run_node(self, n: Node) -> Any:
        """The value of ``n``, after looking at it and, before a batch norm, at what it gets."""
        if n.target in _NORMS:
            self._expect(n)
        value = super().run_node(n)
        if n.op in ("call_function", "placeholder") and isinstance(value, Tensor) and value.is_floating_point():
            self._look(n, value)
        return value

    def _look(self, node: Node, value: Tensor) -> None:
        if value.numel() == 0:
            return
        seen = self._seen.setdefault(node, _Seen())
        usable = value.abs() < SENTINEL
        plain = torch.where(usable, value, 0.0)
        seen.non_finite += int(torch.isnan(value).sum() + torch.isposinf(value).sum())
        peak = float(plain.abs().amax())
        if peak > seen.largest:
            seen.largest, seen.second, seen.owner = peak, seen.largest, self._batch
        else:
            seen.second = max(seen.second, peak)
        bounds = _bounds(node)
        if bounds is None or value.dim() < 2:
            return
        channels = plain.movedim(1 if value.dim() == 4 else -1, 0).flatten(1)
        alive = (channels != 0).any(1)
        upper = bounds[1]
        stuck = torch.zeros(len(channels)) if upper is None else (channels >= upper * 0.999).double().sum(1)
        if seen.alive is None or seen.stuck is None or seen.alive.shape != alive.shape:
            seen.alive, seen.stuck, seen.count = alive, stuck, channels.shape[1]
        else:
            seen.alive, seen.stuck, seen.count = seen.alive | alive, seen.stuck + stuck, seen.count + channels.shape[1]

    def _expect(self, norm: Node) -> None:
        x, _, _, mean, variance = self.fetch_args_kwargs_from_env(norm)[0][:5]
        if not isinstance(mean, Tensor) or not isinstance(variance, Tensor) or x.dim() < 2:
            return
        channels = x.movedim(1, 0).flatten(1).double()
        total, squares = channels.sum(1), channels.square().sum(1)
        if norm in self._norms:
            before = self._norms[norm][0]
            made = _Moments(before.count + channels.shape[1], before.total + total, before.squares + squares)
        else:
            made = _Moments(channels.shape[1], total, squares)
        self._norms[norm] = made, mean, variance

    def findings(self, batches: int) -> list[DataFinding]:
        """What looks wrong, in the order of the graph."""
        found = []
        for node in self._nodes:
            if node in self._norms:
                found += _unnormalised(node, *self._norms[node])
            if node in self._seen:
                found += _anomalies(node, self._seen[node], batches)
        return found


def _bounds(node: Node) -> tuple[float | None, float | None] | None:
    """Least and largest value of an activation; None for an op without."""
    if node.target in _CLAMPS:
        low, high = (*node.args[1:3], None, None)[:2]
        if node.target is not aten.clamp.default and len(node.args) < 2:
            low, high = -1.0, 1.0
        return (
            float(low) if isinstance(low, (int, float)) else None,
            float(high) if isinstance(high, (int, float)) else None,
        )
    return _BOUNDED.get(node.target)


def _place(node: Node) -> str:
    return f"the input '{input_path(node)}'" if node.op == "placeholder" else where(node)


def _anomalies(node: Node, seen: _Seen, batches: int) -> list[DataFinding]:
    found = []
    if seen.non_finite:
        text = f"{seen.non_finite} values are NaN or +inf: no range can be found; look at the data and the model"
        found.append(DataFinding("non-finite", _place(node), text))
    if batches > 1 and seen.second > 0 and seen.largest >= OWNS * seen.second:
        text = (
            f"batch {seen.owner} alone decides the range: it reaches {seen.largest:g}, all others {seen.second:g}; "
            "look at that batch, or use a percentile"
        )
        found.append(DataFinding("owner", _place(node), text))
    if seen.alive is not None and not bool(seen.alive.all()):
        dead = torch.nonzero(~seen.alive).flatten().tolist()
        text = f"{_some(dead, len(seen.alive))} zero throughout: dead, or not reached by this data"
        found.append(DataFinding("dead", _place(node), text))
    if seen.stuck is not None and bool((seen.stuck > SATURATED * seen.count).any()):
        stuck = torch.nonzero(seen.stuck > SATURATED * seen.count).flatten().tolist()
        text = f"{_some(stuck, len(seen.stuck))} at the upper bound for more than half of the values: saturated"
        found.append(DataFinding("saturated", _place(node), text))
    return found


def _some(channels: list[int], total: int) -> str:
    first = ", ".join(str(channel) for channel in channels[:5]) + (", ..." if len(channels) > 5 else "")
    return f"{len(channels)} of {total} channels ({first}) {'is' if len(channels) == 1 else 'are'}"


def _unnormalised(norm: Node, moments: _Moments, mean: Tensor, variance: Tensor) -> list[DataFinding]:
    own = moments.total / moments.count
    spread = (moments.squares / moments.count - own.square()).clamp(min=0).sqrt()
    expected = variance.double().clamp(min=1e-12).sqrt()
    shift = float(((own - mean.double()).abs() / expected).median())
    ratio = float((spread / expected).median())
    if shift <= NORMALISED and 1 / NORMALISED <= ratio <= NORMALISED:
        return []
    text = (
        f"its input is {shift:.1f} standard deviations from the running mean, and {ratio:.2g} times as wide, in the "
        "median channel: is the data normalised as it was in training?"
    )
    return [DataFinding("unnormalised", where(norm), text)]
