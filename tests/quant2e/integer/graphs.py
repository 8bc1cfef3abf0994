"""Q/DQ graphs of a few ops, written by hand: integers in, dequantize, ops, quantize, integers out."""

from __future__ import annotations

import operator
import os

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from quant2e import to_integer
from quant2e.graph.captured.module import CapturedModule
from quant2e.graph.qdq_ops import qd
from tests.quant2e.integer.reference import Grid

aten = torch.ops.aten

CASES = int(os.environ.get("QUANT2E_INTEGER_CASES", "200"))
"""Generated cases of each op; thousands on demand: QUANT2E_INTEGER_CASES=5000."""

MODES = ("float32", "fixed_point", "fixed_point_single_rounding", "power_of_two")

DTYPES = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767)}


class Draw:
    """One generated case: shapes, scales, zero points and integers, from a seed. ``mode`` takes turns."""

    def __init__(self, seed: int, dtypes=(torch.int8, torch.uint8)) -> None:
        self.rng = np.random.default_rng(seed)
        self.mode = MODES[seed % len(MODES)]
        self.dtype = dtypes[seed // len(MODES) % len(dtypes)]

    def int(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def flag(self) -> bool:
        return bool(self.rng.integers(2))

    def pick(self, *options):
        return options[self.rng.integers(len(options))]

    def scale(self, low: float = 2**-8, high: float = 2**-3) -> float:
        s = float(np.float32(np.exp(self.rng.uniform(np.log(low), np.log(high)))))
        return 2.0 ** round(np.log2(s)) if self.mode == "power_of_two" else s

    def scales(self, n: int, low: float = 2**-10, high: float = 2**-6) -> Tensor:
        return torch.tensor([self.scale(low, high) for _ in range(n)], dtype=torch.float32)

    def grid(self, scale: float | None = None, dtype=None) -> Grid:
        dtype = dtype or self.dtype
        low, high = DTYPES[dtype]
        if self.flag() and dtype is torch.int8:
            low = -127
        zero = 0 if dtype is torch.int16 else self.int(low, high)
        grid = Grid(self.scale() if scale is None else scale, zero, low, high)
        grid.dtype = dtype
        return grid

    def integers(self, shape, grid: Grid) -> Tensor:
        return torch.from_numpy(self.rng.integers(grid.low, grid.high + 1, shape)).to(grid.dtype)

    def weight(self, shape, low: int = -127, high: int = 127) -> Tensor:
        return torch.from_numpy(self.rng.integers(low, high + 1, shape)).to(torch.int8)


class Writer:
    """Writes a graph and computes it at once, so that every node has its value."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.gm = CapturedModule({}, self.graph)
        self.gm.inputs = None
        self.graph = self.gm.graph
        self.inputs: list[Tensor] = []
        self.integer: GraphModule | None = None

    def _add(self, node: Node, value) -> Node:
        node.meta["val"] = value
        return node

    def op(self, target, *args, **kwargs) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        real_args, real_kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        return self._add(node, target(*real_args, **real_kwargs))

    def pick(self, several: Node, index: int) -> Node:
        """One of several results."""
        node = self.graph.call_function(operator.getitem, (several, index))
        return self._add(node, several.meta["val"][index])

    def plain(self, x: Tensor) -> Node:
        self.inputs.append(x)
        return self._add(self.graph.placeholder(f"x{len(self.inputs)}"), x)

    def input(self, x: Tensor, grid: Grid) -> Node:
        return self.dq(self.plain(x), grid)

    def constant(self, value: Tensor) -> Node:
        name = f"c{len(list(self.gm.buffers()))}"
        self.gm.register_buffer(name, value)
        return self._add(self.graph.get_attr(name), value)

    def dq(self, x: Node, grid: Grid) -> Node:
        return self.op(
            qd.dequantize_per_tensor.default, x, grid.scale, grid.zero_point, grid.low, grid.high, grid.dtype
        )

    def q(self, x: Node, grid: Grid) -> Node:
        return self.op(qd.quantize_per_tensor.default, x, grid.scale, grid.zero_point, grid.low, grid.high, grid.dtype)

    def weight(self, w: Tensor, scale, axis: int | None, zero=None, low: int = -128, high: int = 127) -> Node:
        node = self.constant(w)
        if axis is None:
            return self.op(qd.dequantize_per_tensor.default, node, float(scale), int(zero or 0), low, high, w.dtype)
        zero = torch.zeros(len(scale), dtype=torch.int64) if zero is None else zero
        scales, zeros = self.constant(scale), self.constant(zero)
        return self.op(qd.dequantize_per_channel.default, node, scales, zeros, axis, low, high, w.dtype)

    def finish(self, *results: Node) -> GraphModule:
        self.results = [result.meta["val"] for result in results]
        self.graph.output(tuple(results))
        vars(self.gm).pop("_code", None)  # compiled when it is called
        return self.gm


def run_integer(writer: Writer, results, mode: str, inputs=None) -> list[np.ndarray]:
    """The integer graph's results; strict, and no float op but the multiply of ``float32`` (checked)."""
    gm = writer.integer = to_integer(writer.finish(*results), requantization=mode, strict=True)
    averages = any(n.target in MEANS for n in writer.graph.nodes)
    assert_integer(gm, mode, FLOAT_STEPS | {aten.add.Tensor} if averages else FLOAT_STEPS)
    outs = gm(*(writer.inputs if inputs is None else inputs))
    return [out.numpy().astype(np.int64) for out in outs]


FLOAT_STEPS = {aten.mul.Tensor, aten.round.default, aten.clamp.default, aten._to_copy.default}
PLAIN = {operator.getitem, operator.mul}
"""Python's own: one of several results, products of sizes."""

MEANS = {aten.mean.dim, *(getattr(aten, f"adaptive_avg_pool{n}d").default for n in (1, 2, 3))}
"""A mean on the grid of its operand may add an offset in float, as XNNPACK does."""


def assert_integer(gm: GraphModule, mode: str, float_steps=frozenset(FLOAT_STEPS)) -> None:
    """Only ATen; floats only for ``clamp(round(float(acc) * ratio))`` of the float32 mode."""
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        assert str(node.target).startswith("aten.") or node.target in PLAIN, node.format_node()
        value = node.meta.get("val")
        assert value is not None, node.format_node()
        if node.target in PLAIN or type(value) is int:  # a part of a split, or a size
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            assert isinstance(one, Tensor), node.format_node()
            assert mode == "float32" or not one.dtype.is_floating_point, node.format_node()
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            assert mode == "float32", node.format_node()
            assert node.target in float_steps, node.format_node()


def difference_from_qdq(writer: Writer, found: list[np.ndarray]) -> tuple[int, int, int]:
    """Outputs, how many differ from the Q/DQ graph, and by how many steps at the most."""
    outs = [out.numpy().astype(np.int64) for out in writer.results]
    gaps = np.concatenate([np.abs(a - b).flatten() for a, b in zip(outs, found, strict=True)])
    return gaps.size, int((gaps > 0).sum()), int(gaps.max(initial=0))


class Tally:
    """Differences from the Q/DQ graph, over all cases of an op."""

    def __init__(self) -> None:
        self.total = self.off = self.worst = 0

    def add(self, writer: Writer, found, mode: str, *, counted: bool = True) -> None:
        total, off, worst = difference_from_qdq(writer, found)
        self.worst = max(self.worst, worst)
        if counted and mode != "fixed_point":  # which rounds twice, see docs/integer_semantics.md
            self.total, self.off = self.total + total, self.off + off

    def check(self) -> None:
        assert self.worst <= 1
        assert self.off <= max(self.total // 10_000, 1), (self.off, self.total)
