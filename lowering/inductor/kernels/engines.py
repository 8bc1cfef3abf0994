"""Kernel engines: which library computes a quantized op, measured for its shape, on this machine.

No library is fastest everywhere. oneDNN's int8 linear reads one row slower than a float kernel does on CPUs without
VNNI, and is twice as fast from a few dozen rows on; a depthwise convolution is often best in float. An `Engine` is a
way to compute a `Product`; `fastest` times the engines on random data of its shape and remembers the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowering.inductor.kernels import weight_only
from lowering.inductor.kernels.transposed import TransposedConvolution

Run = Callable[[], object]

WEIGHT_ONLY = "weight_only"

SECONDS = 0.03
"""How long one engine is timed for one shape, at least; the fastest call counts."""

LEAST_GAIN = 50e-6
"""Seconds by which another engine must beat the preferred one: below, the clock and the call itself decide."""

LEAST_RATIO = 0.9
"""And the part of the preferred engine's time that it may take at the most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A linear layer or a convolution with a constant weight.

    ``x``: shape of the activation, ``weight``: of the weight, output channels first. ``stride``, ``padding``,
    ``dilation``: one number per spatial dimension, empty for a linear layer. ``bias``: whether it has one.
    ``output_padding``: of a transposed convolution, whose weight has its input channels first; None of a plain one.
    ``integers``: whether the result is wanted as integers. ``float_rows``: the activation is float, and only the weight
    is quantized; then ``group``: inputs that share a scale, ``group_bytes``: of that scale and its zero point,
    ``bits``: of a weight, ``int8_rows``: whether the rows are dequantized from int8 with a scale each, and ``varies``:
    whether the number of rows does, ``x`` being an example. ``together``: how many products of its integers are proven
    to fit into 16 bits, 4, 2 or 1, where our kernels are faster for it, and oneDNN's right.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    output_padding: tuple[int, ...] | None = None
    bias: bool = True
    integers: bool = False
    float_rows: bool = False
    group: int = 0
    group_bytes: int = 4
    bits: int = 8
    int8_rows: bool = False
    varies: bool = False
    together: int = 4

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer."""
        return not self.stride

    def __str__(self) -> str:
        if self.is_linear:
            rows = torch.Size(self.x[:-1]).numel()
            kind = "linear"
            if self.float_rows:
                kind = f"{self.bits}-bit {'int8-row' if self.int8_rows else 'weight-only'} linear"
            return f"{kind} {rows}x{self.weight[1]}x{self.weight[0]}"
        kind = "depthwise conv" if self.groups == self.weight[0] > 1 else "conv"
        kind = kind if self.output_padding is None else "transposed conv"
        return f"{kind} {'x'.join(map(str, self.x))} by {'x'.join(map(str, self.weight))}"


class Engine(Protocol):
    """A way to compute a product of an integer weight with an unsigned 8-bit activation, or with float rows."""

    @property
    def name(self) -> str:
        """For reports and for choosing by hand."""
        ...

    def computes(self, product: Product) -> bool:
        """Whether it can."""
        ...

    def prepare(self, product: Product) -> Run | None:
        """A call that computes it on random data, weights packed beforehand; None where the engine cannot."""
        ...


@dataclass(frozen=True, slots=True)
class OneDnn:
    """oneDNN's int8 kernels, as Inductor calls them: integers in, float or integers out."""

    name: str = "onednn"

    def computes(self, product: Product) -> bool:
        """Whether both operands are integers."""
        return not product.float_rows

    def prepare(self, product: Product) -> Run | None:
        """A call of ``onednn.qlinear_pointwise`` or ``onednn.qconv_pointwise``."""
        if not self.computes(product):
            return None
        x, weight, scales, points, bias = _operands(product)
        out = (0.05, 0, torch.uint8) if product.integers else (1.0, 0, torch.float32)
        ops = torch.ops.onednn
        no_activation: tuple[str, list[float], str] = ("none", [], "")
        if product.is_linear:
            packed = ops.qlinear_prepack(weight, list(x.shape))
            return lambda: ops.qlinear_pointwise(x, 0.02, 3, packed, scales, points, bias, *out, *no_activation)
        shape = (list(product.stride), list(product.padding), list(product.dilation), product.groups)
        if (transposed := _transposed(product)) is not None:
            weight, shape = transposed.plain_weight(weight), transposed.plain_shape
            scales, points = scales.repeat(transposed.phases), points.repeat(transposed.phases)
            bias = None if bias is None else bias.repeat(transposed.phases)
        packed = ops.qconv_prepack(weight, scales, 0.02, 3, *shape, list(x.shape))

        def convolution() -> Tensor:
            made: Tensor = ops.qconv_pointwise(x, 0.02, 3, packed, scales, points, bias, *shape, *out, *no_activation)
            return made

        if transposed is None:
            return convolution
        return lambda: _interleaved(transposed, convolution())


def _interleaved(transposed: TransposedConvolution, made: Tensor) -> Tensor:
    """The phases of a plain convolution where they belong in memory, in one copy as Inductor makes it."""
    phases: Tensor = transposed.phases_beside_places(made, lambda op, *args: op(*args))
    return phases.movedim((1, 2), (-2, -1)).contiguous()


@dataclass(frozen=True, slots=True)
class Float:
    """A float kernel on a float copy of the weight; integers are converted before, and after where they are wanted."""

    name: str = "float"

    def computes(self, product: Product) -> bool:
        """Always."""
        return True

    def prepare(self, product: Product) -> Run | None:
        """A call of the float op with what converts from and to integers."""
        integers, stored, _, _, bias = _operands(product)
        weight, x = stored.float(), integers.float()
        if product.float_rows:
            return lambda: torch.nn.functional.linear(x, weight, bias)
        if product.is_linear:
            compute: Callable[[], Tensor] = lambda: torch.nn.functional.linear(x, weight, bias)  # noqa: E731
        elif (t := _transposed(product)) is not None:
            sizes = ([*t.padding], [*t.output_padding], [*t.stride], [*t.dilation], t.groups)
            turned = torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, *sizes, list(x.shape))
            compute = lambda: torch.ops.mkldnn._convolution_transpose_pointwise(  # noqa: E731
                x, turned, bias, *sizes, "none", [], ""
            )
        else:
            shape = (list(product.padding), list(product.stride), list(product.dilation), product.groups)
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *shape, list(x.shape))
            compute = lambda: torch.ops.mkldnn._convolution_pointwise(  # noqa: E731
                x, packed, bias, *shape, "none", [], ""
            )

        def run() -> None:
            integers.float()
            y = compute()
            if product.integers:
                y.to(torch.uint8)

        return run


@dataclass(frozen=True, slots=True)
class WeightOnly:
    """Our kernels for integer weights with groups, by float rows, or by int8 rows with a scale each."""

    name: str = WEIGHT_ONLY

    def computes(self, product: Product) -> bool:
        """Whether only the weight is quantized, and there is a C++ compiler."""
        return product.float_rows and weight_only.load_kernel() is not None

    def prepare(self, product: Product) -> Run | None:
        """A call of `kernels.weight_only`."""
        op = weight_only.load_kernel(weight_only.INT8_ROWS if product.int8_rows else weight_only.FLOAT_ROWS)
        if op is None or not product.float_rows:
            return None
        integers, weight, _, _, bias = _operands(product)
        outputs, inputs = product.weight
        scale = torch.full((outputs, inputs // product.group), 0.01 if product.group_bytes >= 4 else 1 / 64)
        point = torch.full_like(scale, product.group_bytes % 2)
        packed = weight_only.pack(weight.clamp(-8, 7) if product.bits == 4 else weight, scale, point, bits=product.bits)
        added = torch.empty(0) if bias is None else bias
        operands = (packed.weight, packed.scale, packed.zero_point, added)
        if product.int8_rows:
            rows, each = integers.to(torch.int8), torch.ones(product.x[0], 1)
            return lambda: op(rows, each, each, *operands, packed.totals, outputs)
        x = integers.float()
        return lambda: op(x, *operands, outputs)


ENGINES: tuple[Engine, ...] = (OneDnn(), WeightOnly(), Float())
"""In order of preference: a later one has to be clearly faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """The engine for one op. ``seconds``: what each engine took, empty where nothing was measured."""

    engine: str
    product: Product
    seconds: Mapping[str, float]

    @property
    def reason(self) -> str:
        """The times that decided, in words."""
        if not self.seconds:
            return "the number of rows varies" if self.product.varies else "chosen by the caller"
        times = ", ".join(f"{name} {value * 1e6:.0f}" for name, value in self.seconds.items())
        return f"microseconds for {self.product} on one thread: {times}"


def _operands(product: Product) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Activation (u8, 0..127), weight (s8), scales (float32), zero points and bias, from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 128, product.x, dtype=torch.uint8, generator=generator)
    weight = torch.randint(-64, 64, product.weight, dtype=torch.int8, generator=generator)
    if not product.is_linear:
        x = x.contiguous(memory_format=_channels_last(product))
    outputs = product.weight[0] if product.output_padding is None else product.weight[1] * product.groups
    bias = torch.zeros(outputs) if product.bias else None
    return x, weight, torch.full((outputs,), 0.01), torch.zeros(outputs, dtype=torch.int64), bias


def _transposed(product: Product) -> TransposedConvolution | None:
    if product.output_padding is None:
        return None
    return TransposedConvolution(
        kernel=product.weight[2:],
        stride=product.stride,
        padding=product.padding,
        output_padding=product.output_padding,
        dilation=product.dilation,
        groups=product.groups,
    )


def _channels_last(product: Product) -> torch.memory_format:
    return torch.channels_last if len(product.x) == 4 else torch.channels_last_3d


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def timed(engines: Sequence[Engine], product: Product) -> dict[str, float]:
    """Seconds of the fastest of several calls by engine, called in turn; without the engines that cannot compute it.

    On one thread, in the CPU time of that thread: what else the machine does then counts for little.
    """
    with torch.no_grad(), _one_thread():
        runs = {engine.name: run for engine in engines if (run := engine.prepare(product)) is not None}
        for run in runs.values():
            run()
        best = dict.fromkeys(runs, float("inf"))
        end, rounds = time.perf_counter() + SECONDS * len(runs), 0
        while rounds < 3 or time.perf_counter() < end:
            for name, run in runs.items():
                start = time.thread_time()
                run()
                best[name] = min(best[name], time.thread_time() - start)
            rounds += 1
    return best


_KNOWN: dict[tuple[Product, tuple[Engine, ...]], KernelChoice] = {}


def fastest(product: Product, engines: Sequence[Engine] = ENGINES) -> KernelChoice:
    """The engine to compute ``product`` with, on this machine.

    The first engine, unless another takes at most `LEAST_RATIO` of its time and saves `LEAST_GAIN`, by the best of two
    measurements: what else the machine does during one should not take an op out of its region. Each shape is measured
    once per process.
    """
    key = (product, tuple(engines))
    if key not in _KNOWN:
        seconds = timed(engines, product)
        if _winner(seconds) != next(iter(seconds)):
            again = timed(engines, product)
            seconds = {name: min(value, again[name]) for name, value in seconds.items()}
        _KNOWN[key] = KernelChoice(engine=_winner(seconds), product=product, seconds=seconds)
    return _KNOWN[key]


def _winner(seconds: Mapping[str, float]) -> str:
    preferred = next(iter(seconds))
    best = min(seconds, key=lambda name: seconds[name])
    gain = seconds[preferred] - seconds[best]
    return best if gain >= max(LEAST_GAIN, seconds[preferred] * (1 - LEAST_RATIO)) else preferred
