"""Blocks of the fuzzer: ops that the conformance generator does not call, and the functions with bodies and state."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from quantizers.conformance.program import Ref, Shape
from quantizers.conformance.program_builder import ProgramBuilder, UnfitError
from tests.fuzz import functions
from tests.fuzz.program import Parameter, Values

aten = torch.ops.aten

Block = Callable[["FuzzBuilder"], Ref]

SIZES: Mapping[int, tuple[Shape, ...]] = {
    1: ((8,), (1,), (13,)),
    2: ((4, 8), (1, 8), (3, 7), (5, 1), (2, 31), (1, 1)),
    3: ((2, 4, 8), (1, 5, 32), (3, 1, 7), (2, 7, 1), (1, 3, 17)),
    4: ((2, 4, 8, 8), (1, 3, 7, 5), (2, 1, 6, 6), (1, 5, 1, 9), (3, 2, 4, 11), (1, 8, 3, 3)),
    5: ((1, 2, 4, 4, 4), (1, 3, 2, 5, 1)),
}
"""Shapes of inputs, by rank: powers of two, ones and primes."""


class FuzzBuilder(ProgramBuilder):
    """A builder whose inputs have sizes and kinds of values of the fuzzer, and may be truth values."""

    def __init__(self, choose: Callable[[Sequence[Any]], Any], kinds: Sequence[str], first: int | None = None) -> None:
        super().__init__(choose)
        self._kinds, self._first = kinds, first

    def input(self, shape: Shape, limit: int = 0) -> Ref:
        ref = super().input(shape if self._first is None else (self._first, *shape[1:]), limit)
        given = self._inputs[ref.index]
        self._inputs[ref.index] = Values(given.shape, limit, "normal" if limit else self.choose(self._kinds))
        return ref

    def floats(self, *, rank: int | None = None, shape: Shape | None = None) -> list[Ref]:
        """As ever, without tensors of no axis, which few ops take."""
        return [ref for ref in super().floats(rank=rank, shape=shape) if self.shape(ref)]

    def mask(self, shape: Shape) -> Ref:
        """A new input of truth values."""
        ref = super().input(shape)
        self._inputs[ref.index] = Values(shape, 0, "bool")
        self._values[ref.index] = torch.empty(shape, device="meta", dtype=torch.bool)
        return ref

    def pick(self, *, rank: int | None = None, shape: Shape | None = None) -> Ref:
        known = self.floats(rank=rank, shape=shape)[:3]
        found = self.choose([*known[:1], *known, *known[:1], None]) if known else None
        if found is not None:
            return found
        return self.input(shape or self.choose(SIZES[self.choose([4, 3, 2]) if rank is None else rank]))


def _unary(target: Any, *arguments: Any, **keywords: Any) -> Block:
    return lambda b: b.call(target, b.pick(), *arguments, **keywords)


def _positive(target: Any, *arguments: Any) -> Block:
    """Of a value that is at least a half."""
    return lambda b: b.call(target, b.call(aten.add.Tensor, b.call(aten.abs.default, b.pick()), 0.5), *arguments)


def _small(target: Any) -> Block:
    """Of a value between -1 and 1."""
    return lambda b: b.call(target, b.call(aten.tanh.default, b.pick()))


def _channels(b: FuzzBuilder) -> tuple[Ref, int]:
    x = b.pick(rank=b.choose([4, 3]))
    return x, b.shape(x)[1]


def _group_norm(b: FuzzBuilder) -> Ref:
    x, channels = _channels(b)
    groups = b.choose([1, channels])
    return b.call(
        aten.group_norm.default, x, groups, Parameter((channels,), role="scale"), Parameter((channels,), role="bias")
    )


def _batch_norm(b: FuzzBuilder) -> Ref:
    x, channels = _channels(b)
    roles = ("scale", "bias", "variance", "variance")
    return b.call(functions.batch_norm, x, *(Parameter((channels,), role=role) for role in roles))


def _prelu(b: FuzzBuilder) -> Ref:
    x, channels = _channels(b)
    return b.call(aten.prelu.default, x, Parameter((b.choose([1, channels]),), role="scale"))


def _broadcast(target: Any) -> Block:
    """With an operand of one row, or of one value."""

    def block(b: FuzzBuilder) -> Ref:
        x = b.pick()
        shape = b.shape(x)
        other = b.input(b.choose([(1,) * len(shape), (*[1] * (len(shape) - 1), shape[-1]), shape]))
        return b.call(target, x, other)

    return block


def _parts(target: Any, *arguments: Any) -> Block:
    """One of the tensors that an op cuts its operand into, or two of them added."""

    def block(b: FuzzBuilder) -> Ref:
        x = b.pick()
        if b.shape(x)[-1] % 2:
            raise UnfitError
        cut = b.call(target, x, *arguments, -1)
        first = b.call(operator.getitem, cut, 0)
        return b.call(aten.add.Tensor, first, b.call(operator.getitem, cut, 1)) if b.choose([True, False]) else first

    return block


def _masked(b: FuzzBuilder) -> Ref:
    x = b.pick()
    filled = b.call(aten.masked_fill.Scalar, x, b.mask(b.shape(x)), b.choose([0.0, -1.0, -1e9]))
    return b.call(aten.softmax.int, filled, -1) if b.choose([True, False]) else filled


def _where(b: FuzzBuilder) -> Ref:
    x = b.pick()
    shape = b.shape(x)
    other = b.pick(shape=shape)
    mask = b.mask(shape) if b.choose([True, False]) else b.call(aten.gt.Scalar, x, 0.1)
    return b.call(aten.where.self, mask, x, other)


def _attention(b: FuzzBuilder) -> Ref:
    x = b.pick(rank=3)
    batch, length, width = b.shape(x)
    mask = b.mask((batch, length, length)) if b.choose([False, True]) else None
    return b.call(functions.attention, x, *(Parameter((width, width)) for _ in range(3)), mask)


def _linear_body(function: Any, *roles: str) -> Block:
    """A function with bodies, over a tensor whose last size stays."""

    def block(b: FuzzBuilder) -> Ref:
        x = b.pick(rank=b.choose([2, 3]))
        width = b.shape(x)[-1]
        shapes = {"weight": (width, width), "bias": (width,)}
        return b.call(function, x, *(Parameter(shapes[role], role=role) for role in roles))

    return block


def _remembered(function: Any) -> Block:
    def block(b: FuzzBuilder) -> Ref:
        x = b.pick()
        shape = b.shape(x) if function is functions.remember else (1,)
        return b.call(function, x, Parameter(shape, role="state"))

    return block


def _pair(target: Any) -> Block:
    def block(b: FuzzBuilder) -> Ref:
        x = b.pick()
        return b.call(target, x, b.pick(shape=b.shape(x)))

    return block


def _einsum(b: FuzzBuilder) -> Ref:
    x = b.pick(rank=3)
    return b.call(aten.einsum.default, "abc,cd->abd", [x, Parameter((b.shape(x)[-1], 4))])


def _interpolated(target: Any, *tail: Any) -> Block:
    return lambda b: b.call(target, b.pick(rank=4), None, *tail, [2.0, 2.0])


def _picked(b: FuzzBuilder) -> Ref:
    x = b.pick(rank=2)
    index = b.input((b.choose([3, 1]),), b.shape(x)[1])
    return b.call(aten.index_select.default, x, 1, index)


def _ranked(b: FuzzBuilder) -> Ref:
    x = b.pick(rank=2)
    return b.call(operator.getitem, b.call(aten.topk.default, x, b.choose([1, 2]), -1), 0)


BLOCKS: Mapping[str, tuple[Block, ...]] = {
    "math": (
        _unary(aten.abs.default), _unary(aten.neg.default), _unary(aten.sin.default), _unary(aten.erf.default),
        _unary(aten.softplus.default), _unary(aten.square.default), _unary(aten.floor.default),
        _unary(aten.round.default), _unary(aten.sign.default), _unary(aten.pow.Tensor_Scalar, 2),
        _unary(aten.mul.Tensor, 0.1), _unary(aten.add.Tensor, 3.0), _unary(aten.rsub.Scalar, 1.0),
        _unary(aten.div.Tensor, 7.0), _unary(aten.elu.default), _unary(aten.celu.default), _unary(aten.selu.default),
        _unary(aten.hardsigmoid.default), _unary(aten.hardswish.default), _unary(aten.mish.default),
        _unary(aten.silu.default), _unary(aten.log_sigmoid.default), _unary(aten.threshold.default, 0.1, -0.5),
        _unary(aten.relu.default), _unary(aten.gelu.default), _unary(aten.leaky_relu.default, 0.2),
        _small(aten.exp.default), _small(aten.acos.default), _small(aten.expm1.default),
        _positive(aten.log.default), _positive(aten.sqrt.default), _positive(aten.rsqrt.default),
        _positive(aten.reciprocal.default), _positive(aten.pow.Tensor_Scalar, 0.5), _positive(aten.log1p.default),
        _unary(aten.relu_.default), _unary(aten.add_.Tensor, 1.0),
    ),
    "reductions": (
        _unary(aten.sum.dim_IntList, [-1], True), _unary(aten.mean.dim, [-1], True), _unary(aten.amax.default, [-1]),
        _unary(aten.amin.default, [-1]), _unary(aten.cumsum.default, -1), _unary(aten.sum.default),
        _unary(aten.mean.default), _unary(aten.argmax.default, -1), _unary(aten.softmax.int, 0),
        _unary(aten.log_softmax.int, -1), _unary(aten.linalg_vector_norm.default, 2, [-1]),
        _unary(aten.var.correction, [-1], correction=0),
    ),
    "norms": (_group_norm, _batch_norm, _batch_norm, _prelu),
    "pairs": (
        _broadcast(aten.add.Tensor), _broadcast(aten.mul.Tensor), _broadcast(aten.sub.Tensor),
        _pair(aten.maximum.default), _pair(aten.minimum.default), _pair(aten.add.Tensor), _pair(aten.mul.Tensor),
    ),
    "parts": (
        _parts(aten.chunk.default, 2), _parts(aten.tensor_split.sections, 2), _unary(aten.glu.default, -1),
        _unary(aten.tril.default), _unary(aten.flip.default, [0]), _unary(aten.unfold.default, -1, 1, 1), _picked,
    ),
    "masks": (_masked, _where),
    "products": (_attention, _einsum),
    "sizes": (
        _interpolated(aten.upsample_nearest2d.vec), _interpolated(aten.upsample_bilinear2d.vec, False), _ranked,
    ),
    "bodies": (
        _linear_body(functions.branch, "weight", "weight", "bias"), _linear_body(functions.loop, "weight"),
        _linear_body(functions.recurrence, "weight", "weight"),
    ),
    "state": (_remembered(functions.remember), _remembered(functions.count)),
}  # fmt: skip
"""Blocks by group; a group is chosen first, so that few blocks are as frequent as many."""
