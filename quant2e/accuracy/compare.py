"""Comparison of a float and a quantized model, op by op.

quant2e.compare(model, quantized, data)        worst ops first, by module, by source line
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from quant2e.accuracy.advice import advice
from quant2e.accuracy.comparison import INPUT, Comparison, OpError, OutputError
from quant2e.accuracy.float_graphs import drop_observers
from quant2e.accuracy.output_error import outputs_of
from quant2e.accuracy.shadow import FloatValues, Powers, ShadowRun, rounds
from quant2e.calibration.batches import check_batch, check_count, check_iterable
from quant2e.calibration.feed import Feed, Transform
from quant2e.errors import CalibrationError, Quant2eError, module_path, source_line
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import capture, is_captured
from quant2e.graph.captured.dynamic_shapes import read_dynamic_shapes
from quant2e.graph.captured.module import check_dtypes, independent_copy
from quant2e.graph.control_flow import graphs_of
from quant2e.graph.fake_values import is_float
from quant2e.graph.mutation import own_written_tensors
from quant2e.integer.report import INTEGER
from quant2e.observers.base import is_observer_call
from quant2e.observers.fake_quant import disable_observer
from quant2e.quantized_io import called_with_floats, quantized_io_of
from quant2e.quantized_model import QuantizedModel
from quant2e.ranges.sqnr import sqnr_db
from quant2e.report.record import RECORD_KEY, GraphRecord
from quant2e.report.report import Report
from quant2e.stages import stage


@stage("compare")
def compare(
    float_model: nn.Module | ExportedProgram | GraphModule,
    quantized: QuantizedModel | GraphModule | Callable[..., Any],
    data: Iterable[Any],
    *,
    transform: Transform | None = None,
    num_batches: int | None = None,
) -> Comparison:
    """How far each op of ``quantized`` is from ``float_model``, on ``data``: by itself, and with what it inherits.

    ``float_model``: a module, an ExportedProgram, or a graph that `quant2e.capture` or `quant2e.prepare_pt2e` returned.
    ``quantized``: what was made from it, a `QuantizedModel`, also one that was loaded, a converted graph, or one that
    is trained with fake quantization. Of what has no ATen graph (a lowered program) and of integer graphs the outputs
    are compared. ``data``, ``transform``: what the models take, as for `quant2e.calibrate`, the first ``num_batches``
    of it. Memory is that of one item of data, whatever their number. Both models are left as they are.

    Raises `Quant2eError` when no op of the two has the same name and shape, so that they are not one model, and
    `CalibrationError` without data.
    """
    check_iterable(data, "data")
    check_count(num_batches)
    graph, report, program = _read(quantized)
    feed = Feed(data, graph, transform=transform)
    calls = _checked(islice(feed, num_batches), graph)
    first = next(calls, None)
    if first is None:
        raise CalibrationError("compare needs at least one batch of data")
    reference = _reference(float_model, _example(quantized, first), graph)
    run = values = None
    if graph is not None and isinstance(reference, GraphModule) and not _outputs_only(graph):
        run = ShadowRun(graph, _counterparts(reference, graph, report))
        values = FloatValues(reference, frozenset(run.counterparts.values()))
    outputs = _Outputs(reference, program)
    batches = 0
    for call in _chained(first, calls):
        for model in (reference, graph):
            if isinstance(model, GraphModule) and not quantized_io_of(model):
                check_dtypes(model, call)
        outputs.add(call, f"batch {batches}")
        if run is not None and values is not None:
            run.add(call, values.of(call))
        batches += 1
    rows = () if run is None or graph is None else _rows(graph, run.powers)
    if run is not None and not run.not_compared and not any(row.target != INPUT for row in rows):
        raise Quant2eError(
            "no op of the two models has the same name and shape: compare a model with what was quantized from it"
        )
    return Comparison(rows, outputs.errors(), batches, (*_notes(graph, run), *feed.notes))


def _notes(graph: GraphModule | None, run: ShadowRun | None) -> Iterator[str]:
    """What was not compared, and why."""
    if graph is not None and (why := _outputs_only(graph)):
        yield why
    if run is not None and run.not_compared:
        names = sorted(node.name for node in run.not_compared)
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        yield f"{len(names)} ops read or give tensors that the model writes to: not compared ({shown})"
    if graph is not None and not any(is_float(leaf) for leaf in graph.graph.output_node().all_input_nodes):
        yield "no output is a float: outputs are not compared"
    if graph is not None and len(list(graphs_of(graph))) > 1:
        yield "a loop or a branch is compared as one op, not what is inside"


def _checked(calls: Iterable[Call], graph: GraphModule | None) -> Iterator[Call]:
    for index, call in enumerate(calls):
        yield check_batch(call, f"batch {index}", graph)


def _example(quantized: Any, first: Call) -> Call:
    """Inputs to capture the float model with: those of the quantized one, for the first item may be a batch of one."""
    if not isinstance(quantized, QuantizedModel) or quantized.quantized_io:
        return first
    return Call(quantized.example_inputs, dict(quantized.example_kwargs))


def _chained(first: Call, rest: Iterator[Call]) -> Iterator[Call]:
    yield first
    yield from rest


def _read(quantized: Any) -> tuple[GraphModule | None, Report | None, Callable[..., Any]]:
    """The graph, its report, and what is called; no graph for lowered programs."""
    module = quantized.module if isinstance(quantized, QuantizedModel) else quantized
    if not isinstance(module, GraphModule):
        if not callable(module):
            raise Quant2eError(
                f"compare takes a quantized model, a graph or a lowered program, not a {type(module).__name__}"
            )
        return None, None, module
    if not is_captured(module):
        raise Quant2eError("this graph is not one of ATen ops: compare takes what quantize or convert_pt2e returned")
    record = module.meta.get(RECORD_KEY)
    report = record.report if isinstance(record, GraphRecord) else None
    own = _own(module)
    return own, quantized.report if isinstance(quantized, QuantizedModel) else report, called_with_floats(own)


def _own(module: GraphModule) -> GraphModule:
    """A copy that changes nothing of ``module``: neither its buffers nor what its fake-quantizers have observed."""
    own = independent_copy(module)
    for _, graph in graphs_of(own):
        for name in {str(node.target) for node in graph.graph.nodes if is_observer_call(node)}:
            observer = copy.deepcopy(graph.get_submodule(name))
            observer.apply(disable_observer)
            graph.set_submodule(name, observer)
    return own


def _outputs_only(graph: GraphModule) -> str:
    """Why the ops of a graph are not compared; empty when they are."""
    if quantized_io_of(graph):
        return "inputs and outputs are integers: outputs are compared; compare the model without int8_io for its ops"
    if INTEGER in graph.meta:
        return "the graph computes in integers: outputs are compared; compare the Q/DQ graph for its ops"
    return ""


def _reference(model: Any, call: Call, graph: GraphModule | None) -> nn.Module:
    """The float model, in tensors of its own: a graph where ops are compared, a module itself where outputs are."""
    captured = isinstance(model, ExportedProgram) or is_captured(model)
    if graph is None and not captured and isinstance(model, nn.Module):
        return copy.deepcopy(model)
    shapes = None if captured or graph is None else read_dynamic_shapes(graph)
    gm = capture(model, call.args, call.kwargs, dynamic_shapes=shapes)
    own_written_tensors(gm)
    drop_observers(graph for _, graph in graphs_of(gm))  # of a prepared graph: it is float
    return gm


def _counterparts(reference: GraphModule, graph: GraphModule, report: Report | None) -> dict[str, str]:
    """For each op of ``graph``, the node of ``reference`` with the same result: the last op that was folded into it."""
    place = {node.name: i for i, node in enumerate(reference.graph.nodes)}
    nodes = (node for node in graph.graph.nodes if not rounds(node))  # a step of rounding may have an op's name
    names = {node.name for node in nodes if node.op == "placeholder" or node.users}
    found = {name: name for name in names if name in place}
    for verdict in report.verdicts if report is not None else ():
        into, op = verdict.folded_into, verdict.op.name
        if into and op not in names and op in place and place[op] > place.get(found.get(into, ""), -1):
            found[into] = op
    return found


class _Outputs:
    """Errors of the float outputs, leaf by leaf."""

    def __init__(self, reference: Callable[..., Any], program: Callable[..., Any]) -> None:
        self._reference, self._program = reference, program
        self._sums: dict[int, Powers] = {}

    def add(self, call: Call, name: str) -> None:
        """Run both on one item of data, which is ``name`` in errors."""
        wanted = _called(self._reference, call, f"the float model, on {name}")
        got = _called(self._program, call, f"the quantized model, on {name}")
        if len(wanted) != len(got):
            raise Quant2eError(f"the float model returns {len(wanted)} values and the quantized one {len(got)}")
        for index, (exact, result) in enumerate(zip(wanted, got, strict=True)):
            if not isinstance(exact, Tensor) or not exact.is_floating_point():
                continue
            if not isinstance(result, Tensor) or result.shape != exact.shape:
                found = f"of shape {list(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
                raise Quant2eError(
                    f"output {index} is {found}, and a tensor of shape {list(exact.shape)} in float: compare a model "
                    "with what was made from it"
                )
            self._sums.setdefault(index, Powers()).add_result(exact, result)

    def errors(self) -> tuple[OutputError, ...]:
        """One for each output that is a float tensor."""
        return tuple(OutputError(i, sqnr_db(s.signal, s.total), s.cosine) for i, s in self._sums.items())


def _called(model: Callable[..., Any], call: Call, name: str) -> list[Any]:
    try:
        return outputs_of(model, call)
    except Quant2eError:
        raise
    except Exception as error:
        raise Quant2eError(f"{name}, failed: {type(error).__name__}: {error}") from error


def _rows(graph: GraphModule, powers: Mapping[str, Powers]) -> tuple[OpError, ...]:
    rows = []
    arriving: dict[Node, float] = {}
    for node in graph.graph.nodes:
        before = min((arriving[source] for source in node.all_input_nodes), default=math.inf)
        sums = powers.get(node.name)
        if sums is not None:
            rows.append(_row(node, sums, before))
        arriving[node] = before if sums is None else sqnr_db(sums.signal, sums.total)
    return tuple(sorted(rows, key=lambda row: row.local_sqnr_db))


def _row(node: Node, sums: Powers, before: float) -> OpError:
    return OpError(
        op=node.name,
        target=str(node.target) if node.op == "call_function" else INPUT,
        module=module_path(node),
        source=source_line(node),
        local_sqnr_db=sqnr_db(sums.signal, sums.own),
        weight_sqnr_db=sqnr_db(sums.signal, sums.weights),
        activation_sqnr_db=sqnr_db(sums.signal, sums.rounding),
        sqnr_db=sqnr_db(sums.signal, sums.total),
        cosine=sums.cosine,
        operands_sqnr_db=before,
        advice=advice(node, sums),
    )
