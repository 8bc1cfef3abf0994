"""Quantization-aware training beside calibration and beside torchao's, on the digits CNN and the depthwise net.

Each starts from the trained float model and sees the same batches: a tenth of the float schedule, with the learning
rate on a cosine down to a hundredth, and observers and norms fixed for its last third.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import quant2e
from benchmarks.accuracy import nets, training
from benchmarks.demo import digits as demo
from benchmarks.demo.digits import Digits, shifted, top1
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

STEPS, BATCH, RATE = 57, 64, 1e-4
"""Three epochs; the float models took 450 and 600 steps."""

MODELS: Mapping[str, tuple[Callable[[], nn.Module], int, float]] = {
    "digits": (demo.DigitsNet, 450, 5e-3),
    "depthwise": (nets.DepthwiseNet, 600, 1e-2),
}
"""How to make each, and for how many steps at which rate it is trained in float, as in `benchmarks.accuracy.models`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Top-1 on the held-out images, one for each seed, and the median CPU seconds of a step (None: no training).

    ``failed``: why there is nothing. ``instructions``: as `Row.instructions`.
    """

    model: str
    bits: int
    method: str
    top1: tuple[float, ...] = ()
    step_seconds: float | None = None
    failed: str = ""
    instructions: str = ""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "top1": list(self.top1)}


def _config(bits: int, **more: Any) -> XNNPACKQuantizer:
    top = 2 ** (bits - 1) - 1
    config = get_symmetric_quantization_config(is_per_channel=True, weight_qmin=-top, weight_qmax=top, **more)
    return XNNPACKQuantizer().set_global(config)


def _train(model: nn.Module, data: Digits, seed: int, freeze: Callable[[nn.Module], None]) -> float:
    """Train in place; returns the median CPU seconds of a step, which other work on the machine hardly moves."""
    generator = torch.Generator().manual_seed(seed + 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    seconds = []
    for step in range(STEPS):
        if step == 2 * STEPS // 3:
            freeze(model)
        chosen = torch.randint(0, len(data.train_labels), (BATCH,), generator=generator)
        images, labels = shifted(data.train_images[chosen]), data.train_labels[chosen]
        start = time.process_time()
        optimizer.param_groups[0]["lr"] = RATE * (0.01 + 0.99 * (1 + math.cos(math.pi * step / STEPS)) / 2)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels, label_smoothing=0.05).backward()
        optimizer.step()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def _freeze(model: nn.Module) -> None:
    assert isinstance(model, GraphModule)
    model.apply(quant2e.disable_observer)
    quant2e.freeze_batch_norm(model)


def _shapes() -> Any:
    return ({0: torch.export.Dim("batch", min=2, max=256)},)


def calibrated(model: nn.Module, data: Digits, bits: int, _: int, algorithms: Any = ()) -> tuple[nn.Module, None]:
    """`quantize` on 512 training images."""
    images = data.train_images[:512].split(32)
    result = quant2e.quantize(
        model, (images[0],), _config(bits), images,
        dynamic_shapes=_shapes(), algorithms=algorithms, min_sqnr_db=None,
    )  # fmt: skip
    return result.module, None


def ours(model: nn.Module, data: Digits, bits: int, seed: int, *, learned: bool = False) -> tuple[nn.Module, float]:
    """`prepare_qat_pt2e`; ``learned``: scales are parameters (LSQ, Esser et al. 2020), begun by calibration."""
    captured = quant2e.capture(model, (data.train_images[:BATCH],), dynamic_shapes=_shapes())
    quantizer = _learned(bits) if learned else _config(bits, is_qat=True)
    prepared = quant2e.prepare_qat_pt2e(captured, quantizer)
    prepared.train()
    if learned:
        with torch.no_grad():
            for images in data.train_images[:512].split(BATCH):
                prepared(images)
        prepared.apply(quant2e.enable_range_learning)
    seconds = _train(prepared, data, seed, _freeze)
    prepared.eval()
    return quant2e.convert_pt2e(prepared), seconds


def _learned(bits: int) -> XNNPACKQuantizer:
    top = 2 ** (bits - 1) - 1
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True, weight_qmin=-top, weight_qmax=top)

    def learned(spec: quant2e.QuantizationSpec, observer: type) -> quant2e.QuantizationSpec:
        made = quant2e.LearnableFakeQuantize.with_args(observer=observer, use_grad_scaling=True)
        return replace(spec, observer_or_fake_quant_ctr=made)

    activations = quant2e.MovingAverageMinMaxObserver
    config = replace(
        config,
        input_activation=learned(config.input_activation, activations),
        output_activation=learned(config.output_activation, activations),
        weight=learned(config.weight, quant2e.PerChannelMinMaxObserver),
    )
    return XNNPACKQuantizer().set_global(config)


def torchao(model: nn.Module, data: Digits, bits: int, seed: int) -> tuple[nn.Module, float]:
    """Train by torchao's `prepare_qat_pt2e`, with the quantizer of ExecuTorch."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as theirs
    from torchao.quantization.pt2e import allow_exported_model_train_eval, disable_observer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

    top = 2 ** (bits - 1) - 1
    config = theirs.get_symmetric_quantization_config(
        is_per_channel=True, is_qat=True, weight_qmin=-top, weight_qmax=top
    )
    program = torch.export.export(model, (data.train_images[:BATCH],), dynamic_shapes=_shapes())
    prepared = prepare_qat_pt2e(program.module(), theirs.XNNPACKQuantizer().set_global(config))
    allow_exported_model_train_eval(prepared)
    prepared.train()
    seconds = _train(prepared, data, seed, lambda module: _freeze_theirs(module, disable_observer))
    prepared.eval()
    return convert_pt2e(prepared), seconds


def _freeze_theirs(model: nn.Module, disable_observer: Callable[[nn.Module], None]) -> None:
    """Observers stop, and batch norms take their stored statistics, as torchao's tutorial does it on the graph."""
    model.apply(disable_observer)
    assert isinstance(model, GraphModule)
    for node in model.graph.nodes:
        if node.target is torch.ops.aten.batch_norm.default:
            node.args = (*node.args[:5], False, *node.args[6:])
    model.recompile()


Method = Callable[[nn.Module, Digits, int, int], tuple[nn.Module, float | None]]

METHODS: Mapping[str, Method] = {
    "calibrated": calibrated,
    "calibrated, algorithms": partial(calibrated, algorithms="auto"),
    "trained": ours,
    "trained, LSQ": partial(ours, learned=True),
    "trained by torchao": torchao,
}


def measure(name: str, bits: int, seeds: int = 3) -> Iterator[Trained]:
    """All methods on one model: float first, then each from the same trained float models, one for each seed."""
    data = demo.load()
    make, steps, rate = MODELS[name]
    loss = training.digits_loss(data)
    floats = [training.trained(name, make, loss, steps=steps, rate=rate, seed=seed) for seed in range(seeds)]
    yield Trained(model=name, bits=bits, method="float", top1=tuple(_top1(model, data) for model in floats))
    for method in METHODS:
        try:
            runs = [_run(method, copy.deepcopy(model), data, bits, seed) for seed, model in enumerate(floats)]
        except Exception as error:  # noqa: BLE001 - the row says why
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            yield Trained(model=name, bits=bits, method=method, failed=reason)
            continue
        times = [seconds for _, seconds in runs if seconds is not None]
        median = statistics.median(times) if times else None
        yield Trained(model=name, bits=bits, method=method, top1=tuple(share for share, _ in runs), step_seconds=median)


def _run(method: str, model: nn.Module, data: Digits, bits: int, seed: int) -> tuple[float, float | None]:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        made, seconds = METHODS[method](model, data, bits, seed)
    return _top1(made, data), seconds


def _top1(model: Callable[[Tensor], Tensor], data: Digits) -> float:
    return top1(model, data.test_images, data.test_labels, size=256)
