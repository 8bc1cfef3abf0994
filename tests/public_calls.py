"""Makes public calls in a fresh process, each twice, and prints as JSON what each changed of the process.

``python public_calls.py FOLDER NAME...``: what a call needs is made before, so the change is that of the call alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from process_state import difference, snapshot
from torch import nn

import quant2e
from quantizers import OpenVINOQuantizer, X86InductorQuantizer, XNNPACKQuantizer
from quantizers.xnnpack import get_symmetric_quantization_config

BATCHES = [torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


class Small(nn.Module):
    """A convolution, a batch norm, a dropout and a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits; the noise moves the random stream wherever the model runs."""
        noise = torch.rand(1) * 0
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3))) + noise


class Quiet(Small):
    """The same without noise, which no lowering takes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def xnnpack(*, is_qat: bool = False) -> Any:
    """XNNPACK's quantizer, static and per channel."""
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=is_qat))


def result(quantizer: Any = None) -> Any:
    """A quantized model."""
    return quant2e.quantize(Quiet().eval(), (BATCHES[0],), quantizer or xnnpack(), BATCHES)


def prepared() -> Any:
    """An observed model."""
    return quant2e.prepare_pt2e(quant2e.capture(Small().eval(), (BATCHES[0],)), xnnpack())


def calibrated() -> Any:
    """An observed model that has seen data."""
    return quant2e.calibrate(prepared(), BATCHES)


def _capture(_: Path) -> Callable[[], Any]:
    model = Small().eval()
    return lambda: quant2e.capture(model, (BATCHES[0],))


def _capture_that_fails(_: Path) -> Callable[[], Any]:
    class Chooses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if torch.rand(1).item() + x.sum().item() > 0 else -x

    def call() -> None:
        try:
            quant2e.capture(Chooses(), (BATCHES[0],))
        except quant2e.CaptureError:
            return
        raise AssertionError

    return call


def _quantize(_: Path) -> Callable[[], Any]:
    model = Small().eval()
    return lambda: quant2e.quantize(model, (BATCHES[0],), xnnpack(), BATCHES)


def _steps(_: Path) -> Callable[[], Any]:
    captured = quant2e.capture(Small().eval(), (BATCHES[0],))
    return lambda: quant2e.convert_pt2e(quant2e.calibrate(quant2e.prepare_pt2e(captured, xnnpack()), BATCHES))


def _training(_: Path) -> Callable[[], Any]:
    captured = quant2e.capture(Quiet().train(), (BATCHES[0],))

    def call() -> None:
        ready = quant2e.prepare_qat_pt2e(captured, xnnpack(is_qat=True))
        ready(BATCHES[0])
        ready.eval()
        ready(BATCHES[0])
        quant2e.convert_pt2e(ready)

    return call


def _compiled(_: Path) -> Callable[[], Any]:
    ready = prepared()
    return lambda: quant2e.calibrate(ready, BATCHES, compiled=True)


def _check_data(_: Path) -> Callable[[], Any]:
    captured = quant2e.capture(Small().eval(), (BATCHES[0],))
    return lambda: quant2e.check_data(captured, BATCHES)


def _statistics(folder: Path) -> Callable[[], Any]:
    ready = calibrated()

    def call() -> None:
        quant2e.save_statistics(ready, folder / "a.stats")
        quant2e.load_statistics(ready, folder / "a.stats")

    return call


def _save_and_load(folder: Path) -> Callable[[], Any]:
    model = result()

    def call() -> None:
        model.save(folder / "a.pt2")
        quant2e.load(folder / "a.pt2")(BATCHES[1])

    return call


def _to_integer(folder: Path) -> Callable[[], Any]:
    model = result()

    def call() -> None:
        integer = quant2e.to_integer(model.module)
        quant2e.dump_vectors(integer, (BATCHES[0],), folder)

    return call


def _to_inductor(_: Path) -> Callable[[], Any]:
    from lowering import to_inductor

    model = result(X86InductorQuantizer().set_global("w8a8"))
    return lambda: to_inductor(model)(BATCHES[1])


def _package_inductor(folder: Path) -> Callable[[], Any]:
    from lowering import package_inductor

    model = result(X86InductorQuantizer().set_global("w8a8"))
    return lambda: package_inductor(model, path=folder / "a.pt2")(BATCHES[1])


def _to_executorch(folder: Path) -> Callable[[], Any]:
    from lowering import to_executorch

    model = result()

    def call() -> None:
        program = to_executorch(model)
        program(BATCHES[1])
        program.save(folder / "a.pte")

    return call


def _to_onnx(folder: Path) -> Callable[[], Any]:
    from lowering import to_onnx

    model = result()
    return lambda: to_onnx(model, path=folder / "a.onnx")(BATCHES[1])


def _to_native(_: Path) -> Callable[[], Any]:
    from lowering import to_native

    model = result(X86InductorQuantizer().set_global("w8a8"))
    return lambda: to_native(model)(BATCHES[1])


def _to_openvino(folder: Path) -> Callable[[], Any]:
    from lowering import to_openvino

    model = result(OpenVINOQuantizer().set_global("w8a8"))

    def call() -> None:
        program = to_openvino(model)
        program(BATCHES[1])
        program.save(folder / "a.xml")

    return call


def _bench(folder: Path) -> Callable[[], Any]:
    from lowering.bench.command import bench

    result().save(folder / "a.pt2")
    return lambda: bench([folder / "a.pt2"], rounds=1)


CALLS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "capture": _capture,
    "capture that fails": _capture_that_fails,
    "quantize": _quantize,
    "prepare, calibrate, convert": _steps,
    "prepare, train, convert": _training,
    "calibrate, compiled": _compiled,
    "check_data": _check_data,
    "statistics": _statistics,
    "save and load": _save_and_load,
    "to_integer": _to_integer,
    "to_inductor": _to_inductor,
    "package_inductor": _package_inductor,
    "to_executorch": _to_executorch,
    "to_onnx": _to_onnx,
    "to_native": _to_native,
    "to_openvino": _to_openvino,
    "bench": _bench,
}
"""What is called, by name: a function that makes what it needs, and returns the call."""


def main(folder: str, *names: str) -> None:
    """Make the calls and print, by name, the differences after the first and the second time."""
    found: dict[str, list[Any]] = {}
    for name in names:
        call = CALLS[name](Path(folder))
        for _ in range(2):
            before = snapshot()
            call()
            found.setdefault(name, []).append(difference(before, snapshot()))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
