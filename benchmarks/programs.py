"""The same model as an ExecuTorch program by two ways: ExecuTorch's own flow, and ours.

Both calibrate on the batches they are given, or on the one they capture with, and lower to the XNNPACK delegate.
``static``: activations quantized with fixed scales; ``dynamic``: linears with activations quantized at run time;
``float``: nothing quantized. Weights have a scale per output channel.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lowering
import quant2e
from lowering.executorch.report import report_on
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

Inputs = tuple[Any, ...]
SCHEMES = ("static", "dynamic", "float")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A ``.pte`` file's bytes, the sizes of its delegates in ops, what kernels run between them, and how long lowering
    took.

    ``seconds``: from the float module to the bytes, calibration included, verification not.
    """

    buffer: bytes
    delegates: tuple[int, ...]
    left: Mapping[str, int]
    seconds: float


def _program(buffer: bytes, report: lowering.ExecuTorchReport, seconds: float) -> Program:
    delegates = tuple(sum(partition.ops.values()) for partition in report.partitions)
    left = Counter(leftover.op for leftover in report.leftovers)
    return Program(buffer=buffer, delegates=delegates, left=dict(left.most_common()), seconds=seconds)


def ours(model: nn.Module, inputs: Inputs, scheme: str, calibration: Sequence[Inputs] = ()) -> Program:
    """Captured, quantized and lowered by us."""
    start = time.perf_counter()
    graph: Any = quant2e.capture(model, inputs)
    if scheme != "float":
        config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=scheme == "dynamic")
        graph = quant2e.prepare_pt2e(graph, XNNPACKQuantizer().set_global(config))
        for batch in calibration or [inputs]:
            graph(*batch)
        graph = quant2e.convert_pt2e(graph)
    program = lowering.to_executorch(graph, inputs, verify=False)
    return _program(program.buffer, program.report, time.perf_counter() - start)


def theirs(model: nn.Module, inputs: Inputs, scheme: str, calibration: Sequence[Inputs] = ()) -> Program:
    """Captured, quantized by torchao with ExecuTorch's quantizer, and lowered as ExecuTorch documents it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as peer
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    logging.getLogger().setLevel(logging.ERROR)
    start = time.perf_counter()
    graph: Any = torch.export.export(model, inputs).module()
    if scheme != "float":
        config = peer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=scheme == "dynamic")
        graph = prepare_pt2e(graph, peer.XNNPACKQuantizer().set_global(config))
        for batch in calibration or [inputs]:
            graph(*batch)
        graph = convert_pt2e(graph)
    edge = to_edge_transform_and_lower(torch.export.export(graph, inputs), partitioner=[XnnpackPartitioner()])
    report = report_on(edge.exported_program().graph_module, {}, {})
    import executorch.kernels.quantized  # noqa: F401

    buffer = bytes(edge.to_executorch().buffer)
    return _program(buffer, report, time.perf_counter() - start)


FLOWS: Mapping[str, Callable[..., Program]] = {"ExecuTorch's flow": theirs, "quant2e": ours}
