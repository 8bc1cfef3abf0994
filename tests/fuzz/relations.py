"""Metamorphic relations: a change of a model or of its data whose effect on the results is known, before and after
quantization.

Each is an oracle. Where the float graph itself does not keep the relation (a softmax over the rows, a bias that was not
scaled) nothing is asked of the quantized one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import quant2e
from lowering.own_noise import compare_within_noise
from quant2e.graph.qdq_ops import CHOOSE_PER_TENSOR
from quantizers.conformance.program import RandomWeight, Ref, Step
from quantizers.conformance.program_builder import shapes_of
from tests.fuzz.program import FuzzProgram, Parameter
from tests.fuzz.run import Batch, RefusedError, Run, differences, outputs, worst_level

aten = torch.ops.aten

SAME_DB = 90.0
"""Float graphs that agree so far keep a relation: rows are summed in another order, and no more."""

FACTOR = 8.0
"""A power of two: products by it are exact."""

READERS = {
    aten.linear.default: aten.linear.default,
    **{conv: conv for conv in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)},
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
}
"""Layers whose outputs can be permuted, and what reads them back."""


# ------------------------------------------------------------------------------------------------------------ channels
def permuted_channels(run: Run) -> Iterator[str]:
    """A layer whose output channels stand in another order, and so in what reads them, computes the same."""
    for number, step in enumerate(run.program.steps):
        if _can_be_permuted(step) and (program := _read_back(run.program, number)) is not None:
            yield from _permuted(Run(program, run.setting, run.seed))
            return


def _can_be_permuted(step: Step) -> bool:
    if step.target not in READERS or len(step.args) < 2 or step.kwargs:
        return False
    groups = step.args[6] if len(step.args) > 6 else 1
    weight = step.args[1]
    return groups == 1 and isinstance(weight, RandomWeight) and weight.shape[0] > 1


def _read_back(program: FuzzProgram, number: int) -> FuzzProgram | None:
    """The layer with what it needs, a relu and a layer of single points behind it; None where it has other readers."""
    layer = program.steps[number]
    place = len(program.inputs) + number
    shape = shapes_of(program)[place]
    if shape is None:
        return None
    channels = layer.args[1].shape[0]
    dims = len(layer.args[1].shape) - 2
    relu = Step(aten.relu.default, (Ref(place),))
    weight = Parameter((4, channels, *[1] * dims))
    reader = Step(READERS[layer.target], (Ref(place + 1), weight, Parameter((4,), role="bias")))
    grown = replace(program, steps=(*program.steps[: number + 1], relu, reader), outputs=(place + 2,))
    return grown._pruned(grown.outputs)


def _permuted(run: Run) -> Iterator[str]:
    if run.program.has_state:
        return
    try:
        run.go()
    except RefusedError:
        return
    model, last = copy.deepcopy(run.model), len(run.program.steps) - 1
    tensors = {name.partition("_")[2]: x for name, x in model.named_parameters() if name.startswith("bias")}
    weights = {name: x for name, x in model.named_parameters() if name.startswith("weight")}
    (layer,) = (x for name, x in weights.items() if name.endswith(f"_{last - 2}_1"))
    (reader,) = (x for name, x in weights.items() if name.endswith(f"_{last}_1"))
    order = torch.randperm(layer.shape[0], generator=torch.Generator().manual_seed(run.seed))
    layer.data = layer.data[order]
    reader.data = reader.data[:, order].contiguous()
    if (bias := tensors.get(f"{last - 2}_2")) is not None:
        bias.data = bias.data[order]
    found = compare_within_noise(run.quantize(model, run.batches), run.converted, run.calls)
    if not found.passed:
        yield str(found)


# -------------------------------------------------------------------------------------------------------------- scales
def scaled(run: Run) -> Iterator[str]:
    """A net of degree one computes the same bits for inputs and biases that are eight times as large."""
    if not run.program.plain:
        return
    model = copy.deepcopy(run.model)
    for name, x in model.named_parameters():
        if name.startswith("bias"):
            x.data *= FACTOR
    batches = [tuple(_times(x) for x in batch) for batch in run.batches]
    if differences(outputs(model, batches), [[_times(x) for x in call] for call in run.wanted]):
        return
    found = outputs(run.quantize(model, batches), batches)
    if different := differences([[_times(x) for x in call] for call in run.found], found):
        yield different


def _times(x: Tensor) -> Tensor:
    return x * FACTOR if x.is_floating_point() else x


# ---------------------------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True, slots=True)
class Rows:
    """``before``: other rows for a batch; ``after``: from their results, those of the batch."""

    before: Callable[[Sequence[Tensor]], Batch]
    after: Callable[[Tensor], Tensor]

    def around(self, model: nn.Module) -> Callable[..., list[Any]]:
        """The model, called with the other rows, giving the results for its own."""
        return lambda *batch: [self.after(x) for x in pytree.tree_leaves(model(*self.before(batch)))]

    def kept_by(self, run: Run) -> bool:
        """Whether the float graph computes every row for itself."""
        try:
            results = outputs(run.captured, [*map(self.before, run.batches)])
        except quant2e.Quant2eError:  # captured for other sizes
            return False
        found = [[self.after(x) for x in call] for call in results]
        if [[x.shape for x in call] for call in found] != [[x.shape for x in call] for call in run.wanted]:
            return False
        exact = ([[x for x in call if not x.is_floating_point()] for call in calls] for calls in (run.wanted, found))
        return not differences(*exact) and worst_level(run.wanted, found) >= SAME_DB


def _count_of_rows(run: Run) -> int | None:
    """The first size, where all inputs and outputs have the same; None where there are no rows to speak of."""
    tensors = [*run.batches[0], *run.wanted[0]]
    sizes = {x.shape[0] if x.dim() else 0 for x in tensors}
    return sizes.pop() if len(sizes) == 1 and not run.program.has_state else None


def _compared(run: Run, rows: Rows, model: nn.Module, what: str) -> Iterator[str]:
    found = compare_within_noise(rows.around(model), run.converted, run.calls)
    if not found.passed:
        yield f"{what}: {found}"


def permuted_rows(run: Run) -> Iterator[str]:
    """Rows in another order, in calibration and afterwards, give the same rows in that order."""
    count = _count_of_rows(run)
    if count is None or count < 2:
        return
    rows = Rows(lambda batch: tuple(x.flip(0) for x in batch), lambda x: x.flip(0))
    if rows.kept_by(run):
        yield from _compared(run, rows, run.converted, "called with permuted rows")
        again = run.quantize(run.model, [rows.before(batch) for batch in run.batches])
        yield from _compared(run, rows, again, "calibrated with permuted rows")


def joined_batches(run: Run) -> Iterator[str]:
    """Two batches in one call give what two calls give, and calibrate as they do; where scales are the rows' own."""
    sizes = [n.meta["val"].shape[0] for n in run.captured.graph.nodes if n.op == "placeholder" and n.meta["val"].dim()]
    count = _count_of_rows(run)
    if not run.program.varies or count is None or any(isinstance(size, int) for size in sizes):
        return
    other = run.batches[1]
    rows = Rows(lambda batch: _joined(batch, other), lambda x: x[:count])
    if rows.kept_by(run) and not any(node.target in CHOOSE_PER_TENSOR for node in run.converted.graph.nodes):
        yield from _compared(run, rows, run.converted, "two batches in one call")
        again = run.quantize(run.model, [_joined(*run.batches[:2]), *run.batches[2:]])
        same = Rows(tuple, lambda x: x)
        yield from _compared(run, same, again, "two batches calibrated in one")


def _joined(first: Sequence[Tensor], second: Sequence[Tensor]) -> Batch:
    return tuple(torch.cat([a, b]) for a, b in zip(first, second, strict=True))


RELATIONS = (permuted_channels, scaled, permuted_rows, joined_batches)
