"""One row of a peer: the target's own quantizer through torchao's flow, or through NNCF's `quantize_pt2e`.

NNCF is run as it documents it for accuracy: SmoothQuant and its bias correction by sequential measurement, and where
the latter fails the fast one, which the row says.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from torch.fx import GraphModule

from benchmarks.accuracy.ours import row_of
from benchmarks.accuracy.row import NNCF, REDUCED, TORCHAO, Row
from benchmarks.accuracy.schemes import SCHEMES
from benchmarks.accuracy.task import Task


def _exported(task: Task) -> GraphModule:
    program = torch.export.export(task.model, task.example_inputs, dynamic_shapes=task.dynamic_shapes)
    module = program.module()
    assert isinstance(module, GraphModule)
    return module


def torchao(task: Task, quantizer: Any) -> tuple[GraphModule, str]:
    """`prepare_pt2e`, the calibration batches, `convert_pt2e`."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(_exported(task), quantizer)
    with torch.no_grad():
        for batch in task.calibration:
            prepared(*batch)
    return convert_pt2e(prepared), ""


def nncf(task: Task, quantizer: Any) -> tuple[GraphModule, str]:
    """`nncf.experimental.torch.fx.quantize_pt2e`, all batches. Raises ImportError where NNCF is not installed."""
    from nncf import Dataset
    from nncf.experimental.torch.fx import quantize_pt2e

    reasons = []
    for fast in (False, True):
        data = Dataset(list(task.calibration), lambda batch: batch if len(batch) > 1 else batch[0])
        try:
            made = quantize_pt2e(
                _exported(task),
                copy.deepcopy(quantizer),
                data,
                subset_size=len(task.calibration),
                smooth_quant=True,
                fast_bias_correction=fast,
            )
        except Exception as error:  # noqa: BLE001 - the row says what was tried
            reasons.append(f"{'fast' if fast else 'sequential'} bias correction failed: {_short(error)}")
            continue
        note = f"SmoothQuant, {'fast' if fast else 'sequential'} bias correction"
        return made, "; ".join([note, *reasons])
    raise RuntimeError("; ".join(reasons))


FLOWS: dict[str, tuple[Callable[[Task, Any], tuple[GraphModule, str]], Sequence[str]]] = {
    NNCF: (nncf, ("nncf", "torchao")),
    TORCHAO: (torchao, ("torchao",)),
    REDUCED: (torchao, ("torchao",)),
}
"""By method: the flow, and the packages whose versions count."""


def peer_row(task: Task, scheme: str, method: str) -> Row:
    """The scheme's own quantizer through the method's flow; a row with the reason where that fails."""
    flow, packages = FLOWS[method]
    make = SCHEMES[scheme].of(method)
    failed = Row(model=task.name, scheme=scheme, method=method)
    if make is None:
        return _failing(failed, "it has no quantizer for this scheme")
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph, note = flow(task, make())
        seconds = time.process_time() - start
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
        return row_of(task, scheme, method, graph, seconds, (note,) if note else (), versions)
    except Exception as error:  # noqa: BLE001 - a peer that fails has a row that says why
        return _failing(failed, _short(error))


def _failing(row: Row, reason: str) -> Row:
    return Row(model=row.model, scheme=row.scheme, method=row.method, failed=reason)


def _short(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 160 else text[:158].rstrip() + " …"
