"""`tune` on the hard models, beside an exhaustive search of a smaller space: whole blocks, quantized or float."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import quant2e
from benchmarks.accuracy.schemes import SCHEMES
from benchmarks.accuracy.task import Task
from quant2e.accuracy.op_groups import OpGroup, op_groups
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.report.macs import count_macs
from quant2e.report.record import record_of

MAX_DROP = 0.005
"""Of the float model's metric."""

HARD = ("depthwise, hard", "vit, hard", "characters, hard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What `tune` found in ``trials`` trials, without algorithms, and the best of ``mixes`` mixes of blocks.

    ``metric`` and ``float_metric``: on the data that `tune` chooses by; ``test``: on that of the table. ``seconds``: of
    CPU time. ``instructions``: as `Row.instructions`.
    """

    model: str
    scheme: str
    met: bool
    metric: float
    float_metric: float
    test: float
    int8_share: float
    trials: int
    seconds: float | None
    exhaustive_share: float
    mixes: int
    blocks: tuple[str, ...]
    instructions: str = ""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "blocks": list(self.blocks)}


def tuned(task: Task, scheme: str, max_trials: int = 24) -> Tuned:
    """Tune to `MAX_DROP`, then try every mix of blocks."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = quant2e.tune(
            task.model,
            task.example_inputs,
            SCHEMES[scheme].ours(),
            task.calibration,
            task.score,
            dynamic_shapes=task.dynamic_shapes,
            max_drop=MAX_DROP,
            max_trials=max_trials,
        )
    seconds = time.process_time() - start
    share, mixes, blocks = exhaustive(task, scheme, found.float_metric * (1 - MAX_DROP))
    return Tuned(
        model=task.name,
        scheme=scheme,
        met=found.met,
        metric=found.metric,
        float_metric=found.float_metric,
        test=next(iter(task.measure(found.model).values())),
        int8_share=found.model.report.int8_mac_share,
        trials=len(found.trials),
        seconds=seconds,
        exhaustive_share=share,
        mixes=mixes,
        blocks=blocks,
    )


def exhaustive(task: Task, scheme: str, least: float) -> tuple[float, int, tuple[str, ...]]:
    """The largest int8 share of all mixes of blocks whose score is at least ``least``; 0 where none is.

    A block is a child of a list or a sequence of modules, or what is in none. All mixes are evaluated on one calibrated
    graph. Returns also the number of mixes that were evaluated, those with the most work on int8 first, and the blocks.
    """
    captured = quant2e.capture(task.model, task.example_inputs, dynamic_shapes=task.dynamic_shapes)
    prepared = quant2e.prepare_pt2e(captured, SCHEMES[scheme].ours())
    quant2e.calibrate(prepared, task.calibration)
    simulated = SimulatedGraph(prepared)
    blocks: dict[str, list[OpGroup]] = {}
    for group in op_groups(simulated, record_of(prepared).report):
        blocks.setdefault(_block(group), []).append(group)
    work = {name: sum(_macs(group) for group in groups) for name, groups in blocks.items()}
    total = sum(count_macs(node) for node in simulated.graph.graph.nodes)
    mixes = [mix for size in range(len(blocks), -1, -1) for mix in itertools.combinations(blocks, size)]
    mixes.sort(key=lambda mix: -sum(work[name] for name in mix))
    for tried, mix in enumerate(mixes, start=1):
        points = frozenset[Any]().union(*(group.points for name in mix for group in blocks[name]))
        with simulated.rounding(points):
            if task.score(simulated) >= least:
                return sum(work[name] for name in mix) / max(total, 1), tried, tuple(blocks)
    return 0.0, len(mixes), tuple(blocks)


def _macs(group: OpGroup) -> int:
    return sum(map(count_macs, group.nodes))


def _block(group: OpGroup) -> str:
    """The first module that has a number in its path, up to that number; else the first module."""
    modules: Sequence[str] = group.modules or ("the rest",)
    parts = modules[0].split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parts[0]
