"""Verification: a lowered program and its Q/DQ graph, run on the same data and compared.

A difference is counted in steps: one step is the scale of the quantize/dequantize pair that ends the graph, so
"1 step" is one integer at the output. Where the graph ends in float, a step is 1/255 of the reference output's
range in the batch at hand, the step that an 8-bit output would have.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lowering.bounds import MadeUpCall
from lowering.export import Lowerable, graph_of
from lowering.state import Apart, from_start, initial_state_of
from quant2e.errors import LoweringError
from quant2e.graph.captured.calls import Call, call_of
from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.fake_values import is_float, node_tensor
from quant2e.graph.qdq_ops import qd
from quant2e.isolation import IsolatedRandomness
from quant2e.report.html import html_table
from quant2e.report.plain_data import plain_data
from quant2e.stages import OpenStage, stage

_CUTS = movements(Effect.SPLIT)
_MOVES = movements() - _CUTS - movements(Effect.JOIN)
"""Ops behind which a scale is still that of the integers in front of them."""
_CASTS = (torch.ops.aten.to, torch.ops.aten._to_copy)


class NotTakenError(Exception):
    """The graph itself fails on a call that was made up: its bounds allow more than its data does."""

    def __init__(self, call: MadeUpCall, error: Exception) -> None:
        reason = str(error).split("\n")[0]
        super().__init__(f"{call.sizes}, where the graph itself fails: {reason}")
        self.call = call


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a lowered program must reach: at most ``steps`` anywhere, or at least ``sqnr_db`` over all the data.

    Either is enough. One integer of difference is legitimate wherever the target rounds ties another way; in deep
    graphs such differences travel, and the noise ratio says whether they stayed noise.
    """

    steps: float = 1.0
    sqnr_db: float = 40.0

    def __str__(self) -> str:
        return f"at most {self.steps:g} step(s), or SQNR of at least {self.sqnr_db:.1f} dB"


USUAL = Bound()
"""What is asked where nobody says more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDifference:
    """How far one output is from the graph's: see `Verification`."""

    max_steps: float
    sqnr_db: float
    mismatches: float = 0.0

    def within(self, bound: Bound) -> bool:
        """Whether a bound holds. Integers that are not numbers (places, truth values) have to be the same."""
        return not self.mismatches and (self.max_steps <= bound.steps or self.sqnr_db >= bound.sqnr_db)


CALLS = 3
"""How many calls, at least, a graph with state is compared over: what one leaves behind shows in the next."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Verification:
    """How far a lowered program is from its Q/DQ graph.

    ``max_steps``: largest difference, in steps of ``step_rule``. ``max_abs_diff``: the same in the output's unit.
    ``sqnr_db``: 10·log10(Σ reference² / Σ difference²), over every float output and batch; ``inf`` when bit-equal.
    ``mismatches``: share of differing elements among outputs that are integers and no numbers: places, tokens, truth
    values (0 when there are none). ``choices``: ops that chose otherwise than the graph among values that are within
    the bound of each other, topk among ties say; the comparison is then with the graph given these choices.
    ``batches``: how many inputs were compared. ``outputs``: the same for each output, every one of which has to be
    within the bound: an output of many large numbers does not hide one of small ones. ``own_noise_db``: SQNR of the
    graph against itself with the last bits of its floats moved, where that was needed to judge: `lowering.own_noise`.
    ``left_out``: sizes that may vary so far, by the bounds of the graph, at which it fails itself, and how.
    """

    max_steps: float
    max_abs_diff: float
    sqnr_db: float
    mismatches: float
    batches: int
    step_rule: str
    bound: Bound
    own_noise_db: float | None = None
    outputs: tuple[OutputDifference, ...] = ()
    choices: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the bound holds, for every output."""
        whole = OutputDifference(max_steps=self.max_steps, sqnr_db=self.sqnr_db, mismatches=self.mismatches)
        return all(output.within(self.bound) for output in self.outputs or (whole,))

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        integers = f", {self.mismatches:.2%} of the integer outputs differ" if self.mismatches else ""
        noise = (
            f" (moving the last bits of its floats moves the graph itself to {self.own_noise_db:.1f} dB)"
            if self.own_noise_db is not None
            else ""
        )
        choices = f", given what {', '.join(self.choices)} chose among values as good" if self.choices else ""
        left_out = f"; not compared at {'; '.join(self.left_out)}" if self.left_out else ""
        return (
            f"{verdict}: {self.max_steps:.3g} step(s) at most ({self.step_rule}), max abs difference "
            f"{self.max_abs_diff:.3g}, SQNR {self.sqnr_db:.1f} dB over {self.batches} batch(es){integers}{choices}; "
            f"required: {self.bound}{noise}{left_out}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"passed": self.passed, **plain_data(self)}

    def __repr__(self) -> str:
        return f"Verification: {self}"

    def _repr_html_(self) -> str:
        rows = [(name, value) for name, value in self.as_dict().items() if name != "bound" and value is not None]
        return html_table(("", "value"), [*rows, ("required", self.bound)], repr(self))

    def check(self, what: str) -> None:
        """Raise `LoweringError` unless the bound holds. ``what`` names the lowered program."""
        if not self.passed:
            raise LoweringError(f"{what} does not compute what its Q/DQ graph says: {self}")


def output_scales(model: Any) -> list[float | None]:
    """Scale of the quantize/dequantize pair that ends each output of a graph; None where an output ends in float.

    Of floats that become integers the scale is 1.
    """
    if not isinstance(model, GraphModule):
        return []
    outputs = [node for node in model.graph.nodes if node.op == "output"]
    flat = pytree.tree_leaves(outputs[0].args[0]) if outputs else []
    return [scale_at(leaf) if isinstance(leaf, Node) else None for leaf in flat]


def scale_at(node: Node) -> float | None:
    """The scale of the values of a node, which are moved or not; None where no quantize tells it."""
    while node.op == "call_function" and _moves(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    if node.op != "call_function":
        return None
    if node.target in (qd.dequantize_per_tensor.default, qd.quantize_per_tensor.default):
        scale = node.args[1]
        return float(scale) if isinstance(scale, int | float) else None
    value = node_tensor(node)
    rounds = getattr(node.target, "overloadpacket", None) in _CASTS and is_float(node.args[0])
    numbers = value is not None and value.dtype is not torch.bool and not value.is_floating_point()
    return 1.0 if rounds and numbers else None


def _moves(node: Node) -> bool:
    """Whether the values of a node are those of its first operand: moved, or one of the tensors it was cut into."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and node.args[0].target in _CUTS
    return node.target in _MOVES or node.target in _CUTS


@dataclass(slots=True)
class Tally:
    """Running sums of a comparison."""

    steps: float = 0.0
    abs_diff: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    integers: int = 0
    mismatches: int = 0

    def add_float(self, got: Tensor, expected: Tensor, scale: float | None) -> None:
        got, expected = got.double(), expected.double()
        same = (got == expected) | (got.isnan() & expected.isnan())
        diff = torch.where(same, 0.0, (got - expected).abs()).nan_to_num(nan=math.inf)
        finite = torch.where(expected.isfinite(), expected, 0.0)
        worst = float(diff.max()) if diff.numel() else 0.0
        step = scale if scale is not None else float(finite.max() - finite.min()) / 255 if finite.numel() else 0.0
        self.abs_diff = max(self.abs_diff, worst)
        # float32 carries a difference of outputs to about 1e-5 of a step, and no further
        steps = worst / step if step > 0 else (math.inf if worst else 0.0)
        self.steps = max(self.steps, round(steps, 4) if math.isfinite(steps) else steps)
        self.signal += float(finite.square().sum())
        self.noise += float(diff.square().sum())

    def add_integer(self, got: Tensor, expected: Tensor, quantized: bool) -> None:
        diff = (got.to(torch.int64) - expected.to(torch.int64)).abs()
        if not quantized:
            self.integers += diff.numel()
            self.mismatches += int((diff != 0).sum())
        elif diff.numel():
            self.steps = max(self.steps, float(diff.max()))
            self.abs_diff = max(self.abs_diff, float(diff.max()))
            self.signal += float(expected.double().square().sum())
            self.noise += float(diff.double().square().sum())

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            steps=max(self.steps, other.steps),
            abs_diff=max(self.abs_diff, other.abs_diff),
            signal=self.signal + other.signal,
            noise=self.noise + other.noise,
            integers=self.integers + other.integers,
            mismatches=self.mismatches + other.mismatches,
        )

    def difference(self) -> OutputDifference:
        """What was summed up."""
        share = self.mismatches / self.integers if self.integers else 0.0
        return OutputDifference(max_steps=self.steps, sqnr_db=self.sqnr_db(), mismatches=share)

    def sqnr_db(self) -> float:
        if self.noise == 0:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def verify(
    lowered: Callable[..., Any], model: Lowerable, data: Iterable[Any], *, bound: Bound | None = None
) -> Verification:
    """Run ``lowered`` and ``model`` on ``data`` and measure how far apart they are.

    ``lowered``: what a lowering returned, or any callable. ``model``: the Q/DQ GraphModule it came from, or a
    QuantizedModel. ``data``: what calibration takes: tensors, tuples of positional inputs, or dicts of keywords.
    Raises `LoweringError` when ``data`` is empty or the outputs differ in number or shape. A difference in values
    is returned, not raised: see `Verification.passed` and `Verification.check`.
    """
    with stage("verify") as shown:
        return verify_calls(lowered, graph_of(model), _counted(data, shown), bound=bound)


def _counted(data: Iterable[Any], shown: OpenStage) -> Iterator[Call]:
    for number, batch in enumerate(data, 1):
        yield call_of(batch)
        shown(number)


def verify_calls(
    lowered: Callable[..., Any], reference: Any, batches: Iterable[Call], *, bound: Bound | None = None
) -> Verification:
    """`verify`, on calls and on the graph itself."""
    return measure(lowered, Apart(reference, initial_state_of(lowered)), reference, batches, bound=bound)


def measure(
    lowered: Callable[..., Any], own: Apart, reference: Any, batches: Iterable[Call], *, bound: Bound | None = None
) -> Verification:
    """`verify_calls`, where ``own`` computes what ``reference`` says, apart from it."""
    scales = output_scales(reference)
    tallies: dict[int, Tally] = {}
    count = 0
    with from_start(lowered), torch.no_grad(), IsolatedRandomness():
        for got, expected in _runs(lowered, own, batches):
            for g, e, scale, place in _paired(got, expected, scales):
                _compare(tallies.setdefault(place, Tally()), g, e, scale, place)
            count += 1
    if not count:
        raise LoweringError("nothing to verify on: the data has no batches")
    found = any(scale is not None for scale in scales)
    outputs = [tallies[place] for place in sorted(tallies)]
    whole = sum(outputs, Tally())
    return Verification(
        max_steps=whole.steps,
        max_abs_diff=whole.abs_diff,
        sqnr_db=whole.sqnr_db(),
        mismatches=whole.difference().mismatches,
        batches=count,
        step_rule="steps of the output's scale" if found else "steps of 1/255 of the output's range",
        bound=bound or USUAL,
        outputs=tuple(one.difference() for one in outputs),
    )


def _runs(lowered: Callable[..., Any], graph: Apart, batches: Iterable[Call]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Outputs of both sides, call by call.

    Where calls leave state behind, the first batch is repeated until there were `CALLS`, or the graph can do no more.
    """
    program, first, count = Apart(lowered), None, 0
    for call in batches:
        first = first or call
        count += 1
        try:
            expected = _leaves(graph, call)
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(call, MadeUpCall):
                raise NotTakenError(call, error) from error
            raise
        yield _leaves(program, call), expected
    while first is not None and graph.stateful and count < CALLS:
        try:
            expected = _leaves(graph, first)
        except (IndexError, RuntimeError):  # a cache that is full
            return
        count += 1
        yield _leaves(program, first), expected


def _leaves(run: Callable[..., Any], call: Call) -> list[Any]:
    """What a call returns, flat. The model may write to its inputs: it gets copies."""
    args, kwargs = call.copied()
    return pytree.tree_leaves(run(*args, **kwargs))


def _paired(
    got: list[Any], expected: list[Any], scales: list[float | None]
) -> Iterator[tuple[Any, Any, float | None, int]]:
    if len(got) != len(expected):
        raise LoweringError(f"the lowered program returns {len(got)} value(s), its Q/DQ graph {len(expected)}")
    for place, (g, e) in enumerate(zip(got, expected, strict=True)):
        yield g, e, scales[place] if len(scales) == len(expected) else None, place


def _compare(tally: Tally, got: Any, expected: Any, scale: float | None, place: int) -> None:
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        if isinstance(expected, Tensor) or isinstance(got, Tensor):
            raise LoweringError(f"output {place}: {type(got).__name__} instead of {type(expected).__name__}")
        return
    if got.shape != expected.shape:
        raise LoweringError(
            f"output {place} of the lowered program has shape {tuple(got.shape)}, its Q/DQ graph's "
            f"{tuple(expected.shape)}"
        )
    if expected.is_floating_point():
        tally.add_float(got, expected, scale)
    else:
        tally.add_integer(got, expected, quantized=scale is not None)
