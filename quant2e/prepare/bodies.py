"""Bodies of control flow, prepared each as a graph of its own.

    cond(p, f, g, [x, w])        =>        cond(p, f', g', [x])        f' and g' hold w, and observe inside

What enters and leaves a body is float, as the inputs and outputs of a model are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch.fx import GraphModule, Node

from quant2e.errors import where
from quant2e.graph.attributes import tensor_at
from quant2e.graph.constants import Constants
from quant2e.graph.control_flow import BODY, bodies, control_flow, hold_constants, prefixed, run_in_python
from quant2e.graph.mutation import all_observed_writes
from quant2e.report.float_ops import FloatOp, list_float_ops
from quant2e.report.record import report_of
from quant2e.report.report import FLOAT, Report, Verdict, with_body

_LAYER = "torch.nn.modules.module.Module"
"""The type of a layer whose class is not known."""


def prepare_bodies(gm: GraphModule, prepare: Callable[[GraphModule], GraphModule]) -> Report:
    """Prepare the bodies of ``gm``, in place; what happened in them. Those that stay float are in it, with the reason.

    ``prepare``: prepares one body, and the bodies in it.
    """
    report = Report(verdicts=())
    nodes = [node for node in gm.graph.nodes if bodies(node)]
    runs = Counter(path for node in nodes for path in bodies(node))
    constants = frozenset(Constants(gm.graph)) if nodes else frozenset[Node]()
    for node in nodes:
        if (reason := _objection(node, runs)) is not None:
            report = _left_float(report, node, reason)
            continue
        hold_constants(gm, node, constants)
        run_in_python(node, wanted=True)
        for path, body in bodies(node).items():
            _place(body, node)
            body.meta[BODY] = prefixed(gm.meta.get(BODY, ""), path)
            prepared = prepare(body)
            gm.add_submodule(path, prepared)
            report = with_body(report, path, report_of(prepared))
    with_macs = {verdict.op.name.rpartition(".")[0]: None for verdict in report.verdicts if verdict.op.macs}
    if with_macs:
        report = report.with_notes([f"multiply-accumulates are those of one run of {', '.join(with_macs)}"])
    return report


def _objection(node: Node, runs: Counter[str]) -> str | None:
    """Why the ops inside the bodies of a node stay float, if they must."""
    if control_flow(node) is None:
        return "only cond, while_loop, scan and map are quantized inside"
    if node.kwargs or not all(isinstance(node.args[place], list | tuple) for place in _lists(node)):
        return "it is not called as torch.export calls it"
    if shared := [path for path in bodies(node) if runs[path] > 1]:
        return f"'{shared[0]}' is run by other ops as well"
    for path, body in bodies(node).items():
        if (write := next(iter(all_observed_writes(body.graph)), None)) is not None:
            return f"'{write[0].name}' in '{path}' changes a tensor in place that others see"
    return None


def _lists(node: Node) -> tuple[int, ...]:
    flow = control_flow(node)
    return () if flow is None else flow.lists


def _left_float(report: Report, node: Node, reason: str) -> Report:
    for path, body in bodies(node).items():
        verdicts = tuple(Verdict(op, FLOAT, f"inside '{node.name}': {reason}") for op in _float_ops(body))
        report = with_body(report, path, Report(verdicts))
    return report.with_notes([f"{where(node)}: the ops inside its body stay float: {reason}"])


def _float_ops(body: GraphModule) -> Iterator[FloatOp]:
    yield from list_float_ops(body)
    for node in body.graph.nodes:
        for path, inner in bodies(node).items():
            yield from (replace(op, name=prefixed(path, op.name)) for op in _float_ops(inner))


def _place(body: GraphModule, node: Node) -> None:
    """Say of the ops of a body, of which torch.export does not, what modules they lie in: those around ``node``, and
    for an op with a parameter the one that the parameter belongs to.
    """
    around = node.meta.get("nn_module_stack") or {}
    for each in body.graph.nodes:
        if each.op != "call_function" or each.meta.get("nn_module_stack"):
            continue
        sources = each.all_input_nodes if not bodies(each) else []
        held = (str(source.target) for source in sources if tensor_at(body, source) is not None)
        owner = next((path.rpartition(".")[0] for path in held), "")
        known = any(entry[0] == owner for entry in around.values())
        each.meta["nn_module_stack"] = dict(around) if known or not owner else {**around, owner: (owner, _LAYER)}
