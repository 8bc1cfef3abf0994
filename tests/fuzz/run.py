"""A run of the fuzzer: a program with one quantizer, from capture to the Q/DQ graph; and how results are compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import quant2e
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import independent_copy
from quant2e.graph.control_flow import graphs_of
from quant2e.graph.qdq_ops import DEQUANTIZE
from quantizers.conformance.numeric_checks import sqnr
from tests.fuzz.program import FuzzProgram
from tests.fuzz.settings import SETTINGS

Batch = tuple[Tensor, ...]

LARGEST = 1e9
"""Programs that compute larger numbers are not judged."""


class RefusedError(Exception):
    """The program is none that can be judged: torch does not export it, or its floats are not finite."""


class Run:
    """A program with one quantizer. ``stage``: what it is in, where it stops."""

    captured: GraphModule
    prepared: GraphModule
    converted: GraphModule
    wanted: list[list[Tensor]]
    found: list[list[Tensor]]

    def __init__(self, program: FuzzProgram, setting: str, seed: int = 0) -> None:
        self.program, self.setting, self.seed = program, setting, seed
        self.batches: list[Batch] = program.batches(3, seed)
        self.model = program.module(seed)
        self.before = bits_of(self.model)
        self.stage = "the float model"

    def go(self) -> Run:
        """Through capture, prepare, calibrate and convert. Raises `RefusedError`, and what is wrong."""
        try:
            self.wanted = outputs(self.model, self.batches)
        except Exception as error:
            raise RefusedError(f"{self.stage}: {first_line(error)}") from error
        floats = [x for call in self.wanted for x in call if x.is_floating_point() and x.numel()]
        if not all(float(x.abs().max()) < LARGEST for x in floats):
            raise RefusedError("floats that are not finite")
        try:
            self.stage = "capture"
            self.captured = self.capture(self.model)
            self.stage = "prepare"
            self.prepared = quant2e.prepare_pt2e(self.captured, SETTINGS[self.setting]())
            self.stage = "calibrate"
            quant2e.calibrate(self.prepared, self.batches)
            self.stage = "convert"
            self.converted = quant2e.convert_pt2e(self.prepared)
        except quant2e.Quant2eError as error:
            raise RefusedError(f"{self.stage}: {first_line(error)}") from error
        self.stage = "run"
        self.found = outputs(self.converted, self.batches)
        return self

    @property
    def quantized(self) -> bool:
        """Whether anything is."""
        return any(node.target in DEQUANTIZE for _, gm in graphs_of(self.converted) for node in gm.graph.nodes)

    def capture(self, model: nn.Module) -> GraphModule:
        """The graph, with a first size that varies where the program says so."""
        shapes = tuple({0: Dim.AUTO} for _ in self.program.inputs) if self.program.varies else None
        return quant2e.capture(model, copies(self.batches[0]), dynamic_shapes=None if shapes is None else (shapes,))

    def quantize(self, model: nn.Module, batches: Sequence[Batch]) -> GraphModule:
        """The same flow again."""
        prepared = quant2e.prepare_pt2e(self.capture(model), SETTINGS[self.setting]())
        quant2e.calibrate(prepared, batches)
        return quant2e.convert_pt2e(prepared)

    @property
    def calls(self) -> list[Call]:
        """The batches as calls."""
        return [Call(batch, {}) for batch in self.batches]


def first_line(error: Exception) -> str:
    """What an error says first, shortened."""
    return str(error).split("\n")[0][:100]


def copies(batch: Batch) -> Batch:
    """Programs may write to their inputs."""
    return tuple(x.clone() for x in batch)


def outputs(model: nn.Module, batches: Sequence[Batch]) -> list[list[Tensor]]:
    """What calls in a row return, flat, from the state that the model is in, which stays."""
    own = independent_copy(model) if isinstance(model, GraphModule) else copy.deepcopy(model)
    with torch.no_grad():
        return [[x for x in pytree.tree_leaves(own(*copies(batch))) if isinstance(x, Tensor)] for batch in batches]


def bits_of(model: nn.Module) -> dict[str, bytes]:
    """The bytes of every parameter and buffer."""
    return {name: x.detach().numpy().tobytes() for name, x in model.state_dict().items()}


def differences(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> str:
    """Where results differ in a bit; empty where they do not."""
    for number, (first, second) in enumerate(zip(a, b, strict=True)):
        if len(first) != len(second):
            return f"{len(first)} and {len(second)} results"
        for place, (x, y) in enumerate(zip(first, second, strict=True)):
            if x.dtype != y.dtype or x.shape != y.shape:
                return f"output {place}: {x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)}"
            if not torch.equal(x.nan_to_num(), y.nan_to_num()):
                return f"output {place} of call {number}: {_far(x, y)}"
    return ""


def _far(x: Tensor, y: Tensor) -> str:
    return f"{sqnr(x, y):.1f} dB" if x.is_floating_point() else f"{int((x != y).sum())} of {x.numel()} integers"


def worst_level(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> float:
    """The worst SQNR of float outputs, over all calls."""
    levels = [
        sqnr(torch.cat([call[place].flatten() for call in a]), torch.cat([call[place].flatten() for call in b]))
        for place, x in enumerate(a[0])
        if x.is_floating_point() and x.numel()
    ]
    return min(levels, default=math.inf)
