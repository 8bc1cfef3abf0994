"""Integer inputs and outputs: whoever calls the model quantizes and dequantizes.

    placeholder x: float → quantize → dequantize → op        =>        placeholder x: int8 → dequantize → op
    op → quantize → dequantize → output                      =>        op → quantize → output

What an input means is then written beside the graph, as a `Port` per input and output. An input or output that the
graph does not quantize stays float, and `QuantizedIO.floats` says why.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from quant2e.annotation.specs import INTEGER_BOUNDS
from quant2e.documents.schema import from_record
from quant2e.errors import AnnotationError, Quant2eError
from quant2e.graph.captured.inputs import Inputs, inputs_of, leaf_paths
from quant2e.graph.captured.module import CapturedModule, copy_graph
from quant2e.graph.edit import insert_call
from quant2e.graph.fake_values import FakeValueCache, is_float
from quant2e.graph.mutation import observable_writes
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE, qd
from quant2e.passes import run
from quant2e.passes.dead_code import remove_dead_code
from quant2e.passes.split_dequantize import split_dequantize
from quant2e.report.record import RECORD_KEY, GraphRecord

QUANTIZED_IO = "quantized_boundary"
"""Key in ``gm.meta`` under which a graph with integer inputs or outputs keeps its `QuantizedIO`."""

_QUANTIZE, _DEQUANTIZE = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One input or output that carries integers: ``x = (q - zero_point) * scale``.

    ``name``: as it is reached in the call, such as ``x``, ``batch['image']`` or ``output[0]``. ``index``: its position
    among all inputs (outputs) of the model, flattened. ``dtype``: of the integers; ``float_dtype``: of what they stand
    for.
    """

    name: str
    index: int
    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype
    float_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise AnnotationError(f"{self.name}: the scale {self.scale} is not a positive, finite number")
        if self.index < 0 or self.quant_min > self.quant_max:
            raise AnnotationError(f"{self.name}: place {self.index}, range [{self.quant_min}, {self.quant_max}]")
        if self.dtype not in INTEGER_BOUNDS or not self.float_dtype.is_floating_point:
            raise AnnotationError(f"{self.name}: {self.dtype} does not hold integers that stand for {self.float_dtype}")
        low, high = INTEGER_BOUNDS[self.dtype]
        if not low <= self.quant_min <= self.quant_max <= high:
            raise AnnotationError(f"{self.name}: the range [{self.quant_min}, {self.quant_max}] is not of {self.dtype}")

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the quantize ops take after the tensor."""
        return (self.scale, self.zero_point, self.quant_min, self.quant_max, self.dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """The integers for a float tensor: ``clamp(round(x / scale) + zero_point)``, ties to even."""
        q: Tensor = _QUANTIZE(x, *self.arguments)
        return q

    def dequantize(self, q: Tensor) -> Tensor:
        """The floats that a tensor of integers stands for."""
        x: Tensor = _DEQUANTIZE(q, *self.arguments)
        return x.to(self.float_dtype)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {dtype}, scale {self.scale:.6g}, zero point {self.zero_point}"


@dataclass(frozen=True, slots=True)
class QuantizedIO:
    """The inputs and outputs of a model that carry integers; ``floats``: name → why the others carry floats."""

    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    floats: Mapping[str, str] | None = None

    def __bool__(self) -> bool:
        return bool(self.inputs or self.outputs)

    def quantize_inputs(
        self, convention: Inputs, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with float tensors turned into integers where the model takes integers.

        ``convention``: the ``inputs`` of the captured module. Tensors that are integers already stay as they are.
        """
        ports = {port.name: port for port in self.inputs}

        def quantized(name: str, value: Any) -> Any:
            def leaf(path: Any, x: Any) -> Any:
                port = ports.get(name + pytree.keystr(path))
                return port.quantize(x) if port and isinstance(x, Tensor) and x.is_floating_point() else x

            return pytree.tree_map_with_path(leaf, value)

        positional = tuple(quantized(name, value) for name, value in zip(convention.names, args, strict=False))
        return positional, {name: quantized(name, value) for name, value in kwargs.items()}

    def dequantize_outputs(self, outputs: Any) -> Any:
        """What the model returned, with integers turned into the floats they stand for."""
        leaves, spec = pytree.tree_flatten(outputs)
        for port in self.outputs:
            leaves[port.index] = port.dequantize(leaves[port.index])
        return pytree.tree_unflatten(leaves, spec)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `from_dict` is its inverse."""
        sides = {side: [_plain(port) for port in getattr(self, side)] for side in ("inputs", "outputs")}
        return {**sides, "floats": dict(self.floats or {})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizedIO:
        """The inputs and outputs that `as_dict` described. Raises `FileFormatError` for anything else."""
        return from_record(cls, data, "the record of integer inputs and outputs")

    def notes(self) -> Iterator[str]:
        """One line per input and output, for the report."""
        yield from (f"input {port}" for port in self.inputs)
        yield from (f"output {port}" for port in self.outputs)
        yield from (f"{name} stays float: {why}" for name, why in (self.floats or {}).items())


def _plain(port: Port) -> dict[str, Any]:
    dtypes = {name: str(getattr(port, name)).removeprefix("torch.") for name in ("dtype", "float_dtype")}
    return {**asdict(port), **dtypes}


def quantized_io_of(gm: GraphModule) -> QuantizedIO:
    """The integer inputs and outputs of a graph; an empty `QuantizedIO` when it takes and returns floats."""
    quantized_io = gm.meta.get(QUANTIZED_IO)
    return quantized_io if isinstance(quantized_io, QuantizedIO) else QuantizedIO()


def called_with_floats(gm: GraphModule) -> Callable[..., Any]:
    """``gm`` as a function from floats to floats; ``gm`` itself when it takes and returns floats."""
    quantized_io, convention = quantized_io_of(gm), getattr(gm, "inputs", None)
    if not quantized_io or convention is None:
        return gm

    def call(*args: Any, **kwargs: Any) -> Any:
        positional, keywords = quantized_io.quantize_inputs(convention, args, kwargs)
        return quantized_io.dequantize_outputs(gm(*positional, **keywords))

    return call


def with_quantized_io(converted: GraphModule) -> CapturedModule:
    """A copy of a converted graph that takes and returns integers wherever it quantizes its inputs and outputs.

    An input has the numbers that most of its uses have; its other uses read the dequantized tensor. Parameters found at
    run time belong to no caller: such inputs stay float. Every input and output is in the notes of the report.
    Raises `Quant2eError` when no input and no output could carry integers.
    """
    if quantized_io_of(converted):
        raise Quant2eError("this graph takes and returns integers already")
    gm = copy_graph(converted, compiled=False)
    floats: dict[str, str] = {}
    inputs = tuple(_open_inputs(gm, floats))
    outputs = tuple(_open_outputs(gm, floats))
    quantized_io = QuantizedIO(inputs, outputs, floats)
    if not quantized_io:
        listed = "; ".join(f"{name}: {why}" for name, why in floats.items())
        raise Quant2eError(f"no input and no output of this graph can carry integers ({listed})")
    run(gm, (remove_dead_code, split_dequantize), compiled=False)
    gm.recompile()
    gm.meta[QUANTIZED_IO] = quantized_io
    record = gm.meta.get(RECORD_KEY)
    if isinstance(record, GraphRecord):
        gm.meta[RECORD_KEY] = replace(record, report=record.report.with_notes(quantized_io.notes()))
    return gm


def _open_inputs(gm: CapturedModule, floats: dict[str, str]) -> Iterator[Port]:
    """Turn placeholders into integers; yields their ports."""
    convention = inputs_of(gm)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    written, fake_values, checks = observable_writes(gm.graph), FakeValueCache(), []
    for index, (name, node) in enumerate(zip(leaf_paths(convention.names, convention.spec), placeholders, strict=True)):
        if not is_float(node):
            continue
        value = node.meta["val"]
        grids = Counter(user.args[1:] for user in node.users if user.target is _QUANTIZE and _is_integer(user))
        if node in written or not grids:
            floats[f"input {name}"] = "it is written in place" if node in written else _why_float(node)
            continue
        (grid, _), *_ = grids.most_common(1)
        node.meta["val"] = fake_values(value, grid[4])
        _read_integers(gm, node, grid, value)
        checks.append(f"str({name}.dtype) == '{grid[4]}'")
        yield Port(
            name=name, index=index, scale=grid[0], zero_point=grid[1], quant_min=grid[2], quant_max=grid[3],
            dtype=grid[4], float_dtype=value.dtype,
        )  # fmt: skip
    gm.inputs = Inputs(convention.names, convention.spec, (*convention.conditions, *checks))


def _is_integer(call: Node) -> bool:
    """Whether what a quantize makes, or a dequantize reads, are integers: there are floats of 8 bits as well."""
    return call.args[5] in INTEGER_BOUNDS


def _why_float(node: Node) -> str:
    if not node.users:
        return "nothing reads it"
    if any(user.target in QUANTIZE for user in node.users):
        return "its scale is found at run time"
    return "no op that reads it is quantized"


def _read_integers(gm: GraphModule, node: Node, grid: tuple[Any, ...], value: Tensor) -> None:
    """Let every reader of an input read its integers, through a dequantize unless it has one."""
    own = [user for user in node.users if user.target is _QUANTIZE and user.args[1:] == grid]
    for user in own:
        user.replace_all_uses_with(node)
        gm.graph.erase_node(user)
    out: dict[str, Any] = {"out_dtype": value.dtype} if value.dtype != torch.float32 else {}
    for user in [user for user in node.users if not (user.target in DEQUANTIZE and user.args[1:] == grid)]:
        dequantize = insert_call(user, _DEQUANTIZE, (node, *grid), out, value=value)
        user.replace_input_with(node, dequantize)


def _open_outputs(gm: CapturedModule, floats: dict[str, str]) -> Iterator[Port]:
    """Return integers where the graph dequantizes its results; yields their ports."""
    node = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    leaves, spec = pytree.tree_flatten(node.args[0])
    names = _output_names(gm, len(leaves))
    for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if not is_float(leaf):
            continue
        if leaf.target is not _DEQUANTIZE or not _is_integer(leaf):
            floats[name] = f"'{leaf.name}' computes it in float"
            continue
        scale, zero_point, low, high, dtype = leaf.args[1:6]
        leaves[index] = leaf.args[0]
        yield Port(
            name=name, index=index, scale=scale, zero_point=zero_point, quant_min=low, quant_max=high, dtype=dtype,
            float_dtype=leaf.meta["val"].dtype,
        )  # fmt: skip
    node.args = (pytree.tree_unflatten(leaves, spec),)


def _output_names(gm: GraphModule, count: int) -> list[str]:
    """``output`` for the only result, ``output[0]`` or ``output['logits']`` for one of several."""
    codegen = gm.graph._codegen
    spec = codegen.pytree_info.out_spec if isinstance(codegen, _PyTreeCodeGen) else None
    if spec is None or spec.num_leaves != count:
        return [f"output[{i}]" for i in range(count)] if count > 1 else ["output"]
    example = pytree.tree_unflatten(list(range(count)), spec)
    return ["output" + pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(example)]
