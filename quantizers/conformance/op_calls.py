"""Calls of the ops that quantizers quantize, with operands and sizes that are chosen.

A block takes an `OpCall`, which says what the pattern wants of the operands, and writes one call into the builder.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from quant2e.annotation.pattern import Arg, Either, Op, short_name
from quantizers.conformance.movement_calls import CALLS
from quantizers.conformance.program import RandomWeight, Ref, Shape
from quantizers.conformance.program_builder import ProgramBuilder, UnfitError

aten = torch.ops.aten


@dataclass(slots=True)
class OpCall:
    """One op of a pattern while it is written. ``bound``: values that operand names already stand for."""

    builder: ProgramBuilder
    target: Any
    operands: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    bound: dict[str, Any] = field(default_factory=dict)

    def wanted(self, index: int, name: str = "") -> Any:
        """What the pattern says about an operand; None when it is free."""
        return self.operands[index] if index < len(self.operands) else self.keywords.get(name)

    def data(self, index: int, *, rank: int | None = None, shape: Shape | None = None) -> Ref:
        """A float tensor for an operand."""
        want = self.wanted(index)
        if isinstance(want, Op | Either):
            return self._fitting(build(self.builder, want, self.bound, rank=rank, shape=shape), rank, shape)
        if isinstance(want, Arg) and want.constant:
            raise UnfitError
        if isinstance(want, Arg) and isinstance(known := self.bound.get(want.name), Ref):
            return self._fitting(known, rank, shape)
        ref = self.builder.pick(rank=rank, shape=shape)
        if isinstance(want, Arg):
            self.bound[want.name] = ref
        return ref

    def _fitting(self, ref: Ref, rank: int | None, shape: Shape | None) -> Ref:
        if (rank is not None and len(self.builder.shape(ref)) != rank) or shape not in (None, self.builder.shape(ref)):
            raise UnfitError
        return ref

    def weight(self, index: int, shape: Shape, fan_in: int = 1, role: str = "weight") -> RandomWeight:
        """A parameter for an operand. Raises `UnfitError` where the pattern wants something computed."""
        if isinstance(self.wanted(index, role), Op | Either):
            raise UnfitError
        return RandomWeight(shape, fan_in, role)

    def bias(self, index: int, size: int) -> RandomWeight | None:
        """A bias, or none where the pattern lets it be absent."""
        want = self.wanted(index, "bias")
        made = self.weight(index, (size,), 4, "bias")
        needed = isinstance(want, Arg) and not want.optional
        return made if needed else self.builder.choose([made, made, None])


def build(
    builder: ProgramBuilder, pattern: Any, bound: dict[str, Any], *, rank: int | None = None, shape: Shape | None = None
) -> Ref:
    """Write the calls of a pattern. Raises `UnfitError` when they cannot be made."""
    op = builder.choose(pattern.choices) if isinstance(pattern, Either) else pattern
    target = builder.choose(sorted((t for t in op.targets if is_known(t)), key=str))
    operands = builder.choose(list(itertools.permutations(op.operands))[:2]) if op.any_order else op.operands
    call = OpCall(builder, target, tuple(operands), dict(op.keywords), bound)
    return block_of(target)(call, rank, shape)


Block = Callable[[OpCall, int | None, Shape | None], Ref]


def _convolution(dimensions: int) -> Block:
    def block(call: OpCall, _rank: int | None, _shape: Shape | None) -> Ref:
        x = call.data(0, rank=dimensions + 2)
        _, channels, *space = call.builder.shape(x)
        choose = call.builder.choose
        groups = choose([1, 1, channels, 2 if channels % 2 == 0 else 1])
        out = groups * choose([2, 1, 4] if groups < 4 else [1, 2])
        kernel = choose([size for size in (3, 1, 2) if size <= min(space)])
        w = call.weight(1, (out, channels // groups, *[kernel] * dimensions), channels // groups * kernel**dimensions)
        stride, dilation = choose([1, 2]), choose([1, 1, 2])
        padding: Any = [choose([0, 1]) if kernel > 1 else 0] * dimensions
        if getattr(call.target, "_overloadname", "") == "padding":
            stride, padding = 1, choose(["same", "valid"])
        b = call.bias(2, out)
        return call.builder.call(call.target, x, w, b, [stride] * dimensions, padding, [dilation] * dimensions, groups)

    return block


def _transposed(dimensions: int) -> Block:
    def block(call: OpCall, _rank: int | None, _shape: Shape | None) -> Ref:
        x = call.data(0, rank=dimensions + 2)
        channels = call.builder.shape(x)[1]
        choose = call.builder.choose
        groups = choose([1, 1, channels])
        out, kernel, stride = choose([2, 4]), choose([2, 3]), choose([2, 1])
        w = call.weight(1, (channels, out, *[kernel] * dimensions), channels // groups * kernel)
        b = call.bias(2, out * groups)
        ones = [1] * dimensions
        return call.builder.call(
            call.target, x, w, b, [stride] * dimensions, [choose([0, 1])] * dimensions, [0] * dimensions, groups, ones
        )

    return block


def _general_convolution(call: OpCall, _rank: int | None, _shape: Shape | None) -> Ref:
    x = call.data(0, rank=4)
    channels, choose = call.builder.shape(x)[1], call.builder.choose
    transposed, kernel, out = choose([False, True]), choose([3, 1]), choose([4, 2])
    sizes = (channels, out) if transposed else (out, channels)
    w = call.weight(1, (*sizes, kernel, kernel), channels * kernel**2)
    b = call.bias(2, out)
    return call.builder.call(
        call.target, x, w, b, [1, 1], [choose([0, 1]) if kernel > 1 else 0] * 2, [1, 1], transposed, [0, 0], 1
    )


def _linear(call: OpCall, rank: int | None, shape: Shape | None) -> Ref:
    x = call.data(0, rank=call.builder.choose([2, 3]) if rank is None else rank)
    width = call.builder.shape(x)[-1]
    out = shape[-1] if shape else call.builder.choose([4, 8, width, 32])
    return call.builder.call(call.target, x, call.weight(1, (out, width), width), call.bias(2, out))


def _addmm(call: OpCall, _rank: int | None, _shape: Shape | None) -> Ref:
    x = call.data(1, rank=2)
    width, out = call.builder.shape(x)[-1], call.builder.choose([4, 8])
    return call.builder.call(call.target, call.weight(0, (out,), 4, "bias"), x, call.weight(2, (width, out), width))


def _matmul(call: OpCall, rank: int | None, _shape: Shape | None) -> Ref:
    name = short_name(call.target)
    x = call.data(0, rank={"mm": 2, "bmm": 3}.get(name, call.builder.choose([3, 2, 4]) if rank is None else rank))
    *batch, _, width = call.builder.shape(x)
    want = call.wanted(1)
    if isinstance(want, Arg) and want.constant:
        return call.builder.call(call.target, x, call.weight(1, (width, call.builder.choose([4, 8])), width))
    turned = call.builder.call(aten.transpose.int, x, -1, -2)
    free = not isinstance(want, Op | Either)
    other = turned if free and call.builder.choose([True, False]) else call.data(1, shape=(*batch, width, 4))
    if isinstance(want, Arg):
        call.bound[want.name] = other
    return call.builder.call(call.target, x, other)


def _binary(call: OpCall, rank: int | None, shape: Shape | None) -> Ref:
    if isinstance(call.wanted(0), Op | Either) or not isinstance(call.wanted(1), Op | Either):
        left = call.data(0, rank=rank, shape=shape)
        if call.wanted(1) is None and call.builder.choose([False, False, True]):
            return call.builder.call(call.target, left, call.builder.choose([2.0, 0.5, 1]))
        right = _factors(call, left) or call.data(1, shape=call.builder.shape(left))
    else:
        right = call.data(1, rank=rank, shape=shape)
        left = call.data(0, shape=call.builder.shape(right))
    if short_name(call.target).startswith("div"):
        right = call.builder.call(aten.add.Tensor, call.builder.call(aten.relu.default, right), 1.0)
    return call.builder.call(call.target, left, right)


def _factors(call: OpCall, image: Ref) -> Ref | None:
    """One factor for each channel of an image, computed from it; now and then, where the pattern leaves it free."""
    want, dimensions = call.wanted(1), len(call.builder.shape(image)) - 2
    free = isinstance(want, Arg) and not want.constant and short_name(call.target) == "mul"
    if not free or dimensions not in (1, 2) or not call.builder.choose([False, False, True]):
        return None
    pool = aten.adaptive_avg_pool1d.default if dimensions == 1 else aten.adaptive_avg_pool2d.default
    factors = call.builder.call(aten.sigmoid.default, call.builder.call(pool, image, [1] * dimensions))
    call.bound[want.name] = factors
    return factors


def _unary(*arguments: tuple[Any, ...]) -> Block:
    """An op of one tensor, with one of these lists of further arguments."""

    def block(call: OpCall, rank: int | None, shape: Shape | None) -> Ref:
        x = call.data(0, rank=rank, shape=shape)
        return call.builder.call(call.target, x, *call.builder.choose(arguments or ((),)))

    return block


def _pool(dimensions: int, *, adaptive: bool = False) -> Block:
    def block(call: OpCall, _rank: int | None, _shape: Shape | None) -> Ref:
        x, choose = call.data(0, rank=dimensions + 2), call.builder.choose
        if adaptive:
            return call.builder.call(call.target, x, choose([[1] * dimensions, [2] * dimensions]))
        kernel = choose([2, 3])
        stride, padding = choose([2, 1, 3]), choose([0, 0, 1])
        return call.builder.call(call.target, x, [kernel] * dimensions, [stride] * dimensions, [padding] * dimensions)

    return block


def _mean(call: OpCall, rank: int | None, _shape: Shape | None) -> Ref:
    x = call.data(0, rank=4 if rank is None else rank)
    dims = call.builder.choose([[2, 3], [-1, -2], [-1]]) if len(call.builder.shape(x)) > 3 else [-1]
    return call.builder.call(call.target, x, dims, call.builder.choose([True, True, False]))


def _joined(call: OpCall, rank: int | None, shape: Shape | None) -> Ref:
    want = call.wanted(0)
    first = call.builder.pick(rank=rank, shape=shape)
    count = call.builder.choose([2, 2, 3, 1])
    parts = [first, *(call.builder.pick(shape=call.builder.shape(first)) for _ in range(count - 1))]
    if isinstance(want, Arg):
        call.bound[want.name] = parts
    return call.builder.call(
        call.target, parts, call.builder.choose([1, 0, -1]) if len(call.builder.shape(first)) > 1 else 0
    )


def _embedding(call: OpCall, _rank: int | None, _shape: Shape | None) -> Ref:
    rows, width = 16, call.builder.choose([8, 4, 32])
    indices = call.builder.input(call.builder.choose([(2, 4), (5,)]), rows)
    return call.builder.call(call.target, call.weight(0, (rows, width), width), indices)


def _attention(call: OpCall, _rank: int | None, shape: Shape | None) -> Ref:
    query = call.data(0, rank=4, shape=shape)
    key = call.data(1, shape=call.builder.shape(query))
    return call.builder.call(call.target, query, key, key)


def _embedding_bag(call: OpCall, _rank: int | None, _shape: Shape | None) -> Ref:
    rows, width = 16, call.builder.choose([8, 32])
    indices = call.builder.input((6,), rows)
    offsets = call.builder.call(aten.arange.start_step, 0, 6, call.builder.choose([2, 3]), dtype=torch.int64)
    bag = call.builder.call(
        call.target, call.weight(0, (rows, width), width), indices, offsets, False, call.builder.choose([0, 1])
    )
    return call.builder.call(operator.getitem, bag, 0)


def _layer_norm(call: OpCall, rank: int | None, shape: Shape | None) -> Ref:
    x = call.data(0, rank=rank, shape=shape)
    width = call.builder.shape(x)[-1]
    return call.builder.call(call.target, x, [width], RandomWeight((width,)), RandomWeight((width,), role="bias"))


def _moved(call: OpCall, rank: int | None, shape: Shape | None) -> Ref:
    ranks = CALLS[call.target].ranks
    if rank is not None and rank not in ranks:
        raise UnfitError
    known = [len(call.builder.shape(ref)) for ref in call.builder.floats()]
    ranks = (*[r for r in known[:2] if r in ranks], *ranks)
    x = call.data(0, rank=rank if rank is not None else call.builder.choose(ranks), shape=shape)
    if len(call.builder.shape(x)) not in CALLS[call.target].ranks:
        raise UnfitError
    arguments, keywords = CALLS[call.target].arguments(call.builder.shape(x), call.builder.choose)
    return call.builder.call(call.target, x, *arguments, **keywords)


_BY_NAME: Mapping[str, Block] = {
    **{f"conv{n}d": _convolution(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _transposed(n) for n in (1, 2, 3)},
    "convolution": _general_convolution,
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum"), _binary),
    **{f"{kind}_pool{n}d": _pool(n) for kind in ("max", "avg") for n in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{n}d": _pool(n, adaptive=True) for kind in ("avg", "max") for n in (1, 2, 3)},
    "scaled_dot_product_attention": _attention,
    "mean": _mean,
    **dict.fromkeys(("cat", "concat", "stack"), _joined),
    "embedding": _embedding,
    "embedding_bag": _embedding_bag,
    "layer_norm": _layer_norm,
    **dict.fromkeys(
        ("relu", "relu6", "hardswish", "hardsigmoid", "silu", "sigmoid", "tanh", "neg", "abs", "elu", "selu", "mish"),
        _unary(),
    ),
    "gelu": _unary(
        (),
    ),
    "leaky_relu": _unary((), (0.1,)),
    "hardtanh": _unary((), (0.0, 6.0), (-1.0, 0.5)),
    "clamp": _unary((0.0,), (-1.0, 1.0), (0.0, 6.0)),
    "clamp_min": _unary((0.0,)),
    "clamp_max": _unary((1.0,)),
    **dict.fromkeys(("softmax", "log_softmax"), _unary((-1,))),
}


def block_of(target: Any) -> Block:
    """How to call an op. Only for targets that are known."""
    if target in CALLS:
        return _moved
    known = _BY_NAME.get(short_name(target).removesuffix("_"))
    return known if known is not None else _unary()


def is_known(target: Any) -> bool:
    """Whether calls of an op can be written: it has a block, or takes one tensor and nothing else that is required."""
    if target in CALLS:
        return True
    if not isinstance(target, OpOverload):
        return False
    if short_name(target).removesuffix("_") in _BY_NAME:
        return _overload_is_known(target)
    arguments = target._schema.arguments
    takes_one = bool(arguments) and str(arguments[0].type) == "Tensor"
    return takes_one and all(a.has_default_value() for a in arguments[1:])


def _overload_is_known(target: OpOverload) -> bool:
    """Whether the block of that name writes what this overload takes."""
    name, overload = short_name(target).removesuffix("_"), target._overloadname
    allowed = {
        "mean": {"dim"},
        "embedding_bag": {"default"},
        "clamp": {"default"},
        "softmax": {"int"},
        "log_softmax": {"int"},
        "cat": {"default"},
        **{key: {"Tensor"} for key in ("add", "sub", "mul", "div")},
    }
    return overload in allowed.get(name, {"default", "Tensor", "input", "padding", "dim"})
