"""Transposed convolutions as plain ones, with an output channel for each phase of the stride.

    y[s·i + r]  =  Σⱼ x[i - j] · w[s·j + r]        0 ≤ r < s        in each dimension

    conv_transpose(x, w; stride s)        =        crop(interleave(conv(x, w')))

The outputs at ``r``, a phase, are a plain convolution of their own; all phases together are one, with ``s`` times as
many output channels in each dimension, and the channels of one place become places next to each other. Kernels whose
size is no multiple of the stride are filled with zeros, dilated ones as well. What padding takes away is cropped.
Shi et al., "Is the deconvolution layer the same as a convolutional layer?", arXiv:1609.07009.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.dataflow import operands

aten = torch.ops.aten

_DIMENSIONS = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}


def is_transposed(node: Node) -> bool:
    """Whether a node is a transposed convolution."""
    return node.target in _DIMENSIONS or (
        node.target is aten.convolution.default and operands(node)["transposed"] is True
    )


@dataclass(frozen=True, slots=True)
class TransposedConvolution:
    """The sizes of a transposed convolution, one number for each dimension, and of the plain one that it is.

    ``kernel``: of the weight, ``[inputs, outputs / groups, *kernel]``.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, node: Node, weight: tuple[int, ...]) -> TransposedConvolution:
        """Read from a node; ``weight``: the shape of its weight. One dimension becomes two, the first of size one."""
        args, spatial = operands(node), len(weight) - 2

        def sizes(name: str, filled: int) -> tuple[int, ...]:
            listed = tuple(args[name])
            listed = listed * spatial if len(listed) == 1 else listed
            return (filled, *listed) if spatial == 1 else listed

        kernel = (1, *weight[2:]) if spatial == 1 else weight[2:]
        return cls(
            kernel=kernel,
            stride=sizes("stride", 1),
            padding=sizes("padding", 0),
            output_padding=sizes("output_padding", 0),
            dilation=sizes("dilation", 1),
            groups=args["groups"],
        )

    @property
    def phases(self) -> int:
        """Output channels of the plain convolution for each of the transposed one."""
        return math.prod(self.stride)

    @property
    def steps(self) -> tuple[int, ...]:
        """The kernel of the plain convolution: how many values of the input each phase reads."""
        return tuple(-(-width // s) for width, s in zip(self._widths, self.stride, strict=True))

    @property
    def _widths(self) -> tuple[int, ...]:
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def plain_padding(self) -> tuple[int, ...]:
        """The padding of the plain convolution: the least that leaves nothing out at either end."""
        return tuple(
            max(0, m - 1 - first // s, m - 1 - last // s)
            for m, s, (first, last) in zip(self.steps, self.stride, self._beyond, strict=True)
        )

    @property
    def plain_shape(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups of the plain convolution."""
        ones = [1] * len(self.stride)
        return ones, [*self.plain_padding], ones, self.groups

    @property
    def _beyond(self) -> list[tuple[int, int]]:
        """Results too many at either end, where the padding is ``steps - 1``."""
        sizes = zip(self.steps, self._widths, self.stride, self.padding, self.output_padding, strict=True)
        return [(edge, m * s - width + edge - more) for m, width, s, edge, more in sizes]

    @property
    def crop(self) -> list[tuple[int, int]]:
        """Results to leave out at either end of each dimension, once the phases are interleaved."""
        wider = [(p - m + 1) * s for p, m, s in zip(self.plain_padding, self.steps, self.stride, strict=True)]
        return [(first + more, last + more) for (first, last), more in zip(self._beyond, wider, strict=True)]

    def plain_weight(self, weight: Tensor) -> Tensor:
        """``[inputs, outputs / groups, *kernel]`` as ``[outputs · phases, inputs / groups, *steps]``.

        The channels of one phase lie next to each other: what is interleaved are runs of them, in channels last.
        """
        inputs, outputs, n = weight.shape[0], weight.shape[1], len(self.kernel)
        filled = weight.new_zeros(inputs, outputs, *(m * s for m, s in zip(self.steps, self.stride, strict=True)))
        view = filled
        for i, (width, d) in enumerate(zip(self._widths, self.dilation, strict=True)):
            view = view[(slice(None),) * (2 + i) + (slice(0, width, d),)]
        view.copy_(weight.reshape(view.shape))
        split = [size for pair in zip(self.steps, self.stride, strict=True) for size in pair]
        parts = filled.reshape(self.groups, inputs // self.groups, outputs, *split)
        parts = parts.flip([3 + 2 * i for i in range(n)])
        order = [0, *(4 + 2 * i for i in range(n)), 2, 1, *(3 + 2 * i for i in range(n))]
        shape = (self.groups * outputs * self.phases, inputs // self.groups, *self.steps)
        return parts.permute(order).reshape(shape).contiguous()

    def plain_channels(self, values: Tensor) -> Tensor:
        """Numbers of the output channels, ``[outputs]``, as ``[outputs · phases]``: by group, phase and channel."""
        return values.reshape(self.groups, 1, -1).expand(-1, self.phases, -1).reshape(-1)

    def phases_beside_places(self, value: Any, emit: Callable[..., Any]) -> Any:
        """What the plain convolution computed, seen as ``[batch, groups, outputs / groups, size, stride, ...]``.

        A size and a stride for each dimension. ``emit``: makes a call, of op and operands.
        """
        n = len(self.stride)
        value = emit(aten.unflatten.int, value, 1, [self.groups, *self.stride, -1])
        pairs = [place for i in range(n) for place in (3 + n + i, 2 + i)]
        return emit(aten.permute.default, value, [0, 1, 2 + n, *pairs])

    def interleave(self, value: Any, emit: Callable[..., Any]) -> Any:
        """What the plain convolution computed, as the transposed one does. ``emit``: makes a call, of op and operands.

        No size is written into the graph: batches and images may vary.
        """
        n = len(self.stride)
        if self.phases > 1:
            value = self.phases_beside_places(value, emit)
            for i in range(n + 1):
                value = emit(aten.flatten.using_ints, value, 1 + i, 2 + i)
        for i, (first, last) in enumerate(self.crop):
            if first or last:
                value = emit(aten.slice.Tensor, value, 2 + i, first, -last if last else None)
        return value
