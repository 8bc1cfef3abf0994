"""Bodies of control flow, converted each as a graph of its own; the inverse of `quant2e.prepare.bodies`.

    cond(p, f', g', [x])        =>        cond(p, f'', g'', [x, w_quantized])

A body that calibration never ran has no ranges, and stays float.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from quant2e.errors import CalibrationError
from quant2e.graph.constants import Constants
from quant2e.graph.control_flow import BODY, bodies, control_flow, hand_constants, run_in_python
from quant2e.observers.base import is_observer_call
from quant2e.observers.encodings import encode
from quant2e.prepare.masks import FloatTensors
from quant2e.report.record import RECORD_KEY, GraphRecord, record_of


def convert_bodies(gm: GraphModule, convert: Callable[[GraphModule], GraphModule]) -> dict[str, GraphRecord]:
    """Convert the bodies of ``gm``, in place; their records by path. ``convert``: converts a body, with those in it."""
    records: dict[str, GraphRecord] = {}
    for node in list(gm.graph.nodes):
        found = bodies(node)
        if control_flow(node) is None or not all(RECORD_KEY in body.meta for body in found.values()):
            continue
        for path, body in found.items():
            converted = convert(body)
            records[path] = record_of(converted)
            gm.add_submodule(path, converted)
        hand_constants(gm, node)
        run_in_python(node, wanted=False)
    return records


def never_ran(prepared: GraphModule) -> FloatTensors | None:
    """What stays float in a body of control flow that calibration never ran: everything. None for any other graph."""
    calls = [node for node in prepared.graph.nodes if is_observer_call(node)]
    if BODY not in prepared.meta or not calls:
        return None
    constants = Constants(prepared.graph)
    of_data = {str(call.target) for call in calls if call.all_input_nodes[0] not in constants}
    if not of_data or any(_has_range(prepared, name) for name in of_data):
        return None
    reason = "calibration never ran this body of control flow, so it has no ranges: calibrate with data that does"
    report = record_of(prepared).report
    return FloatTensors(
        {str(call.target): reason for call in calls},
        {verdict.op.name: reason for verdict in report.verdicts if verdict.quantized},
    )


def _has_range(prepared: GraphModule, name: str) -> bool:
    try:
        encode(prepared.get_submodule(name))
    except CalibrationError:
        return False
    return True
