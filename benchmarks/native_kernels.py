"""The native int8 kernels layer by layer, beside this core's peak and beside torch's own operators.

``python -m benchmarks.native_kernels`` prints one row per layer. A plan copies its input and computes the layer once,
or many times: the difference is what the kernel takes, without the call and the copy. Ours and oneDNN's operator are
called in turn; times are the best of all rounds, in microseconds, on one thread if ``--threads`` does not say
otherwise. GOPS are 10^9 multiplications and additions a second; the peak is that of products in registers, measured in
the same run. The last row is the inner loop with its sums in memory: where ours comes near it, the compiler found no
registers. ``--out`` also writes the table as Markdown and JSON.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.demo.record import record
from benchmarks.peak import peak_int8, spilled_int8
from benchmarks.timing import machine
from lowering.native.kernels.op import instruction_set, load_region_op
from lowering.native.kernels.plan import RegionConstants, RegionStep, RegionTensor, StepKind, region_plan
from lowering.native.units.packed import add_numbers, packed_step
from lowering.native.units.values import Integers
from lowering.native.units.windows import Window

COLUMNS = ("layer", "us", "GOPS", "of peak", "wanted", "call us", "oneDNN us", "oneDNN / ours")
_X = Integers(scale=0.02, zero=3, low=0, high=255)
Ending = tuple[float, int, torch.dtype, str, list[float], str]

_LONG = 1e-3
"""Seconds: about as long as the plan with a repeated step takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A convolution of an image of ``size`` x ``size``, or where that is 0 a linear layer of ``rows``.

    ``wanted``: what the project asks for, a share of the peak, or GOPS where it is more than 1.
    """

    inputs: int
    outputs: int
    size: int = 0
    rows: int = 0
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False
    wanted: float = 0.0

    @property
    def name(self) -> str:
        """As a reader calls it."""
        if self.rows:
            return f"linear {self.rows} x {self.inputs} x {self.outputs}"
        stride = f" / {self.stride}" if self.stride > 1 else ""
        what = "depthwise " if self.depthwise else ""
        channels = f"{self.inputs}" if self.depthwise else f"{self.inputs} -> {self.outputs}"
        return f"{what}{self.kernel} x {self.kernel}{stride}, {self.size} x {self.size}, {channels}"

    @property
    def weight(self) -> tuple[int, ...]:
        """Sizes of the weight."""
        if self.rows:
            return (self.outputs, self.inputs)
        return (self.outputs, 1 if self.depthwise else self.inputs, self.kernel, self.kernel)

    @property
    def side(self) -> int:
        """Pixels of a row of the result."""
        return -(-self.size // self.stride)

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        pixels = self.rows or self.side**2
        return 2 * pixels * self.outputs * self.kernel**2 * (1 if self.depthwise else self.inputs)


def _depthwise(size: int, channels: int, wanted: float, stride: int = 1, kernel: int = 3) -> Layer:
    return Layer(
        inputs=channels, outputs=channels, size=size, stride=stride, kernel=kernel, depthwise=True, wanted=wanted
    )


LAYERS = (
    Layer(rows=128, inputs=768, outputs=768, wanted=0.88),
    Layer(rows=128, inputs=768, outputs=3072, wanted=0.88),
    Layer(rows=1, inputs=768, outputs=768),
    Layer(rows=1, inputs=4096, outputs=4096),
    Layer(size=112, inputs=16, outputs=96, wanted=0.45),
    Layer(size=56, inputs=96, outputs=24, wanted=0.45),
    Layer(size=56, inputs=24, outputs=144, wanted=0.45),
    Layer(size=56, inputs=144, outputs=24, wanted=0.45),
    Layer(size=28, inputs=144, outputs=32),
    Layer(size=28, inputs=192, outputs=32, wanted=0.88),
    Layer(size=14, inputs=64, outputs=384),
    Layer(size=14, inputs=384, outputs=64, wanted=0.88),
    Layer(size=14, inputs=576, outputs=96, wanted=0.88),
    Layer(size=7, inputs=960, outputs=320, wanted=0.88),
    Layer(size=7, inputs=320, outputs=1280, wanted=0.88),
    Layer(size=224, inputs=3, outputs=32, kernel=3, stride=2),
    Layer(size=56, inputs=64, outputs=64, kernel=3, wanted=0.88),
    Layer(size=28, inputs=128, outputs=128, kernel=3, wanted=0.88),
    Layer(size=14, inputs=256, outputs=256, kernel=3, wanted=0.88),
    Layer(size=7, inputs=512, outputs=512, kernel=3, wanted=0.88),
    _depthwise(112, 32, 80),
    _depthwise(112, 96, 85, stride=2),
    _depthwise(56, 144, 80),
    _depthwise(28, 192, 130),
    _depthwise(14, 576, 130),
    _depthwise(7, 960, 130),
    _depthwise(28, 120, 0, kernel=5),
)

INNER = Layer(rows=6, inputs=768, outputs=64)
"""One block of the inner loop, all of it in the L1 cache."""


def ours(layer: Layer, times: int) -> Callable[[], object]:
    """A call of the op whose plan copies its input and computes the layer ``times`` times."""
    op = load_region_op()
    if op is None:
        raise SystemExit("There is no C++ compiler: set CXX")
    before = layer.kernel // 2
    window = Window(
        kernel=(layer.kernel,) * 2,
        stride=(layer.stride,) * 2,
        before=(before,) * 2,
        dilation=(1, 1),
        after=(before,) * 2,
    )
    constants, weight = RegionConstants(), torch.randint(-127, 128, layer.weight, dtype=torch.int8)
    packed = packed_step(constants, weight, _X, window, layer.inputs if layer.depthwise else 1)
    step, numbers = packed.step, torch.full((layer.outputs,), 1e-3)
    add_numbers(constants, [packed], numbers, numbers)
    step.inverse, step.fast, step.x, step.y = 1.0, 1, 1, 2
    h, w, side = (layer.size, layer.size, layer.side) if layer.size else (1, layer.rows, 1)
    values = [
        RegionTensor(floats=False, h=h, w=w, c=layer.inputs, argument=0),
        RegionTensor(floats=False, h=h, w=w, c=layer.inputs, pad=packed.border, zero=_X.zero),
        RegionTensor(floats=False, h=side, w=side if layer.size else w, c=layer.outputs),
    ]
    plan = region_plan(values, [RegionStep(kind=StepKind.CONCAT, x=0, y=1), *[step] * times], constants, 1, [], 0)
    given = [torch.zeros(1, h, w, layer.inputs, dtype=torch.uint8)]
    return lambda: op(given, plan.numbers, plan.constants, plan.outputs)


def onednn(layer: Layer) -> Callable[[], object]:
    """A call of oneDNN's operator for the same layer."""
    ops = torch.ops.onednn
    weight = torch.randint(-127, 128, layer.weight, dtype=torch.int8)
    scale, zeros = torch.full((layer.outputs,), 1e-3), torch.zeros(layer.outputs, dtype=torch.int64)
    bias = torch.zeros(layer.outputs)
    if layer.rows:
        rows = torch.zeros(layer.rows, layer.inputs, dtype=torch.uint8)
        packed = ops.qlinear_prepack(weight, list(rows.shape))
        end: Ending = (0.05, 3, torch.uint8, "none", [], "")
        return lambda: ops.qlinear_pointwise(rows, _X.scale, _X.zero, packed, scale, zeros, bias, *end)
    x = torch.zeros(1, layer.inputs, layer.size, layer.size, dtype=torch.uint8).contiguous(
        memory_format=torch.channels_last
    )
    groups = layer.inputs if layer.depthwise else 1
    window = ([layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1], groups)
    packed = ops.qconv_prepack(weight, scale, _X.scale, _X.zero, *window, list(x.shape))
    ending: Ending = (0.05, 3, torch.uint8, "none", [], "")
    return lambda: ops.qconv_pointwise(x, _X.scale, _X.zero, packed, scale, zeros, bias, *window, *ending)


def fastest(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """The shortest time of each, in seconds, called in turn for so long."""
    found = [float("inf")] * len(calls)
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            found[place] = min(found[place], time.perf_counter() - start)
    return found


def measure(layer: Layer, peak: float, seconds: float) -> list[str]:
    """A row of `COLUMNS`."""
    once = ours(layer, 1)
    (single,) = fastest([once], seconds / 10)
    times = max(2, int(_LONG / single))
    one, many, peer = fastest([once, ours(layer, 1 + times), onednn(layer)], seconds)
    kernel = (many - one) / times
    speed = layer.operations / kernel
    wanted = "" if not layer.wanted else f"{layer.wanted:.0%}" if layer.wanted <= 1 else f"{layer.wanted:.0f} GOPS"
    micro = [f"{value * 1e6:.1f}" for value in (kernel, one, peer)]
    return [
        layer.name,
        micro[0],
        f"{speed / 1e9:.0f}",
        f"{speed / peak:.0%}",
        wanted,
        micro[1],
        micro[2],
        f"{peer / one:.2f}",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="", help="only layers whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each layer")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    torch.set_num_threads(chosen.threads)
    console = Console(width=200)
    console.print(f"{machine()}; kernels for {instruction_set() or 'nothing'}", highlight=False)
    peak, spilled = 2 * peak_int8() * chosen.threads, 2 * spilled_int8()
    rows = [["products in registers, the peak", "", f"{peak / 1e9:.0f}", "100%", "", "", "", ""]]
    rows += [measure(layer, peak, chosen.seconds) for layer in LAYERS if chosen.layers in layer.name]
    inner = measure(INNER, peak, chosen.seconds)
    rows.append(["the inner loop, 6 x 768 x 64", *inner[1:]])
    share = f"{spilled / peak:.0%}"
    rows.append(["the same with its sums in memory", "", f"{spilled / 1e9:.0f}", share, "", "", "", ""])
    for row in rows:
        console.print(" | ".join(row), highlight=False)
    if chosen.out:
        title = f"native int8 kernels ({instruction_set()}, {chosen.threads} thread(s)) beside the peak and oneDNN"
        record(chosen.out, title, machine(), list(COLUMNS), rows)


if __name__ == "__main__":
    main()
