"""Oracles: what has to hold for every program, one function each."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

import quant2e
from lowering.own_noise import compare_within_noise
from lowering.verify import Bound
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import independent_copy
from quant2e.graph.qdq_ops import DEQUANTIZE
from tests.fuzz import noise, relations
from tests.fuzz.run import Batch, Run, bits_of, copies, differences, first_line, outputs, worst_level
from tests.fuzz.settings import SETTINGS, TRAINED

FLOOR_DB = 8.0
"""As in the conformance check; for programs of plain values."""

SAME_DB = 90.0
"""Rewrites may reorder float arithmetic, and no more."""

FEW = 64
"""Of fewer numbers, or of results of fewer, one draw says little about their distribution."""


def purity(run: Run) -> Iterator[str]:
    """The user's model, graph and data are as they were."""
    if bits_of(run.model) != run.before:
        yield "the model's tensors were changed"
    if any(
        not torch.equal(a, b)
        for batch, again in zip(run.batches, run.program.batches(3, run.seed), strict=True)
        for a, b in zip(batch, again, strict=True)
    ):
        yield "the calibration data was changed"


def capture_is_exact(run: Run) -> Iterator[str]:
    """The captured graph computes what the model does."""
    if different := differences(run.wanted, outputs(run.captured, run.batches)):
        yield different


def observers_only_look(run: Run) -> Iterator[str]:
    """The observed graph computes what the captured one does."""
    if (level := worst_level(run.wanted, outputs(run.prepared, run.batches))) < SAME_DB:
        yield f"{level:.1f} dB"


def layout(run: Run) -> Iterator[str]:
    """Outputs have the dtypes, shapes and strides of the model's.

    Strides are left out where a tensor inside has some for a dimension of size one that say another layout than its
    own: torch's convolutions go by them, and a copy of the tensor does not have them.
    """
    strided = not any(map(_with_idle_strides, run.captured.graph.nodes))
    for call, again in zip(run.wanted, run.found, strict=True):
        for place, (x, y) in enumerate(zip(call, again, strict=True)):
            other = strided and x.stride() != y.stride() and min(x.shape, default=0) > 1
            if (x.dtype, x.shape) != (y.dtype, y.shape) or other:
                yield f"output {place}: {_layout(x)}, then {_layout(y)}"


def _with_idle_strides(node: Node) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, Tensor)
        and value.dim() > 2
        and value.is_contiguous()
        and value.stride() != torch.empty_like(value, memory_format=torch.contiguous_format).stride()
    )


def _layout(x: Tensor) -> str:
    return f"{x.dtype}{list(x.shape)} strides {x.stride()}"


def floor(run: Run) -> Iterator[str]:
    """Results are near the float model's."""
    if run.program.plain and (level := worst_level(run.wanted, run.found)) < FLOOR_DB:
        yield f"{level:.1f} dB from float"


def rounding_noise(run: Run) -> Iterator[str]:
    """Errors are at most twice what uniform rounding noise makes, or little more than the largest of many draws."""
    if not run.program.plain or run.program.has_state or not noise.understood(run.converted):
        return
    if _few(run):
        return
    actual: dict[int, float] = defaultdict(float)
    signal: dict[int, float] = defaultdict(float)
    numbers: dict[int, int] = defaultdict(int)
    for wanted, found in zip(run.wanted, run.found, strict=True):
        pairs = [(a, b) for a, b in zip(wanted, found, strict=True) if a.is_floating_point()]
        for place, (a, b) in enumerate(pairs):
            actual[place] += float((a - b).double().square().sum())
            signal[place] += float(a.double().square().sum())
            numbers[place] += a.numel()
    model = noise.Noise(run.converted, run.batches)
    predicted = model.predicted()
    beyond = [
        place
        for place, power in actual.items()
        if numbers[place] >= FEW
        and predicted[place] < 0.05 * signal[place]
        and power > noise.SAFETY**2 * predicted[place] + 1e-6 * signal[place]
    ]
    largest = model.largest() if beyond else []
    for place in beyond:
        if actual[place] > noise.MARGIN**2 * largest[place]:
            times = math.sqrt(actual[place] / max(predicted[place], 1e-30))
            yield f"output {place}: {times:.1f} times what rounding predicts, and more than the largest of many draws"


def _few(run: Run) -> bool:
    """Whether an input was calibrated on so few numbers that others may lie far beyond them."""
    return any(len(run.batches) * x.numel() < FEW for x in run.batches[0])


def integers(run: Run) -> Iterator[str]:
    """The integer form is within a step, or within the graph's own noise."""
    if not run.quantized:
        return
    try:
        integer = quant2e.to_integer(run.converted)
    except quant2e.Quant2eError as error:
        if "no quantize" not in str(error):
            yield f"refused: {first_line(error)}"
        return
    found = compare_within_noise(integer, run.converted, run.calls, Bound(steps=1.0, sqnr_db=40.0))
    if not found.passed:
        yield str(found)


def saved(run: Run) -> Iterator[str]:
    """A file computes the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        quant2e.save(run.converted, path, copies(run.batches[0]))
        if different := differences(run.found, outputs(quant2e.load(path).module, run.batches)):
            yield different


class _Renamed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.deep = nn.ModuleDict({"er": nn.Sequential()})
        self.deep["er"].weird_name = model

    def forward(self, *inputs: Tensor) -> Any:
        return self.deep["er"].weird_name(*inputs)


def _quantized_again(run: Run, model: nn.Module, batches: Sequence[Batch]) -> Iterator[str]:
    if different := differences(run.found, outputs(run.quantize(model, batches), run.batches)):
        yield different


def deterministic(run: Run) -> Iterator[str]:
    """The same flow gives the same bits."""
    yield from _quantized_again(run, run.model, run.batches)


def order_of_data(run: Run) -> Iterator[str]:
    """So it does with the data in another order."""
    if not run.program.has_state:
        yield from _quantized_again(run, run.model, run.batches[::-1])


def names_of_modules(run: Run) -> Iterator[str]:
    """So it does for the model inside of another one, under other names."""
    yield from _quantized_again(run, _Renamed(run.model), run.batches)


def dead_code(run: Run) -> Iterator[str]:
    """So it does for a graph with ops whose results nothing reads."""
    graph = independent_copy(run.captured)
    place = next(
        (
            n
            for n in graph.graph.nodes
            if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor) and n.meta["val"].is_floating_point()
        ),
        None,
    )
    if place is None:
        return
    with graph.graph.inserting_after(place):
        dead = graph.graph.call_function(torch.ops.aten.neg.default, (place,))
        dead.meta["val"] = place.meta["val"]
    graph.recompile()
    prepared = quant2e.prepare_pt2e(graph, SETTINGS[run.setting]())
    quant2e.calibrate(prepared, run.batches)
    if different := differences(run.found, outputs(quant2e.convert_pt2e(prepared), run.batches)):
        yield different


def strides_of_inputs(run: Run) -> Iterator[str]:
    """Inputs with other strides are the same numbers."""

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1).select(-1, 0) if x.dim() else x

    batches = [tuple(map(strided, batch)) for batch in run.batches]
    own = independent_copy(run.converted)
    with torch.no_grad():
        found = [pytree.tree_leaves(own(*batch)) for batch in batches]
    level = worst_level(run.found, found)
    if level < 40 and not compare_within_noise(own, run.converted, [Call(b, {}) for b in batches]).passed:
        yield f"{level:.1f} dB"


def other_batches(run: Run) -> Iterator[str]:
    """A graph whose first size varies computes batches of one, of none and of a prime number."""
    sizes = [n.meta["val"].shape[0] for n in run.captured.graph.nodes if n.op == "placeholder"]
    if not run.program.varies or not sizes or any(isinstance(size, int) for size in sizes):
        return
    for first in (1, 7, 0):
        program = run.program.resized(first)
        batches = program.batches(2, run.seed)
        try:
            wanted = outputs(run.captured, batches)
        except Exception:  # noqa: BLE001  # the float graph has no such size
            continue
        found = outputs(run.converted, batches)
        level = worst_level(wanted, found)
        if run.program.plain and not _few(run) and first == 7 and level < FLOOR_DB - 3:
            yield f"{level:.1f} dB from float in a batch of {first}"
        shapes = [[x.shape for x in call] for call in wanted], [[x.shape for x in call] for call in found]
        if shapes[0] != shapes[1]:
            yield f"shapes {shapes[1][0]} for a batch of {first}, not {shapes[0][0]}"


def training(run: Run) -> Iterator[str]:
    """A model that was prepared for training computes in eval mode what is converted from it.

    Once its observers are off: while they are on, they learn from what is evaluated as well, as in PT2E.
    """
    if run.setting not in TRAINED or run.program.has_state:
        return
    prepared = quant2e.prepare_qat_pt2e(run.captured, TRAINED[run.setting]())
    prepared.train()
    with torch.random.fork_rng(devices=[]):  # dropout draws from the stream of the process, as it should
        for batch in run.batches:
            prepared(*copies(batch))
    prepared.eval().apply(quant2e.disable_observer)
    converted = quant2e.convert_pt2e(prepared)
    if not any(node.target in DEQUANTIZE for node in converted.graph.nodes):
        return
    found = compare_within_noise(converted, prepared, run.calls)
    if not found.passed:
        yield str(found)


def onnx(run: Run) -> Iterator[str]:
    """onnxruntime computes what the Q/DQ graph says."""
    from lowering import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        yield from _lowered(lambda: to_onnx(run.converted, copies(run.batches[0]), path=Path(folder) / "model.onnx"))


def executorch(run: Run) -> Iterator[str]:
    """So does ExecuTorch."""
    from lowering import to_executorch

    yield from _lowered(lambda: to_executorch(run.converted, copies(run.batches[0])))


def inductor(run: Run) -> Iterator[str]:
    """So does Inductor."""
    from lowering import to_inductor

    yield from _lowered(lambda: to_inductor(run.converted, copies(run.batches[0])))


def _lowered(lower: Callable[[], Any]) -> Iterator[str]:
    """What is wrong with a program; a refusal with a reason is none."""
    try:
        lower()
    except quant2e.Quant2eError as error:
        if "does not compute what" in str(error):
            yield str(error)[:600]


Oracle = Callable[[Run], Iterator[str]]

ALWAYS: tuple[Oracle, ...] = (capture_is_exact, observers_only_look, layout, floor, rounding_noise, integers)
IN_TURN: tuple[tuple[Oracle, ...], ...] = (
    (saved, other_batches),
    (order_of_data, other_batches),
    (names_of_modules, strides_of_inputs),
    (training, other_batches),
    (dead_code, deterministic),
    (relations.permuted_channels, relations.scaled),
    (relations.permuted_rows, relations.joined_batches),
)
"""One row for each program: each takes as long as the run."""

LOWERED: Mapping[str, Oracle] = {f.__name__: f for f in (onnx, executorch, inductor)}
