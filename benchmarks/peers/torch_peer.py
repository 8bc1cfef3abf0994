"""Engines that run inside torch, and ExecuTorch: float and int8, ours and those of torchao and ExecuTorch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

import lowering
import quant2e
from benchmarks import programs
from benchmarks.peers.models import Inputs, calibration_of, inputs_of, model_of
from benchmarks.peers.worker import TRANSFORMERS, Job, Loaded
from quant2e.files import atomic_file
from quantizers import X86InductorQuantizer, get_default_x86_inductor_quantization_config


def _ready(call: Callable[..., Any], inputs: Inputs, made_by: str, start: float) -> Loaded:
    """A callable, run once: what it compiles on its first call is compiled then. ``start``: when lowering began."""

    def run() -> Any:
        with torch.no_grad():
            return call(*inputs)

    run()
    return Loaded(call=run, first=_first, version=made_by, seconds=time.perf_counter() - start)


def _first(outputs: Any) -> np.ndarray:
    tensor: torch.Tensor = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    return tensor.float().numpy()


def _torch() -> str:
    return f"torch {torch.__version__}"


def _threads(job: Job) -> None:
    torch.set_num_threads(job.threads)
    logging.getLogger().setLevel(logging.ERROR)


def eager(job: Job) -> Loaded:
    """The float model as it is."""
    _threads(job)
    model, inputs = model_of(job), inputs_of(job.place)
    return _ready(model, inputs, _torch(), time.perf_counter())


def _compiled(module: Any, inputs: Inputs, made_by: str, start: float) -> Loaded:
    import torch._inductor.config

    torch._inductor.config.freezing = True  # the process is this engine's own
    return _ready(torch.compile(module, dynamic=False), inputs, made_by, start)


def inductor(job: Job) -> Loaded:
    """The float model through torch.compile, with weights as constants."""
    _threads(job)
    model, inputs = model_of(job), inputs_of(job.place)
    return _compiled(model, inputs, _torch(), time.perf_counter())


def ours_inductor(job: Job) -> Loaded:
    """Quantized by us, lowered by us with Inductor."""
    return _ours(job, lowering.to_inductor)


def ours_native(job: Job) -> Loaded:
    """Quantized by us, lowered at once to our own kernels."""
    return _ours(job, lowering.to_native)


def _ours(job: Job, lower: Callable[..., Callable[..., Any]]) -> Loaded:
    """Not verified, so that times to lower compare. Attention's products in int8, which are asked for by name."""
    _threads(job)
    model, inputs = model_of(job), inputs_of(job.place)
    start = time.perf_counter()
    config = get_default_x86_inductor_quantization_config()
    quantizer = X86InductorQuantizer().set_global(config)
    if job.model in TRANSFORMERS:
        quantizer.set_function_type_qconfig(torch.matmul, config)
    prepared = quant2e.prepare_pt2e(quant2e.capture(model, inputs), quantizer)
    quant2e.calibrate(prepared, calibration_of(job.place))
    program = lower(quant2e.convert_pt2e(prepared), inputs, verify=False)
    return _ready(program, inputs, f"quant2e {version('quant2e')}", start)


def torchao(job: Job) -> Loaded:
    """Torchao's flow with its x86 quantizer, as it documents it."""
    return _torchao(job, reduce_range=False)


def torchao_7_bit(job: Job) -> Loaded:
    """The same with activations of 7 bits, with which no kernel saturates."""
    return _torchao(job, reduce_range=True)


def _torchao(job: Job, *, reduce_range: bool) -> Loaded:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as peer

    _threads(job)
    model, inputs = model_of(job), inputs_of(job.place)
    start = time.perf_counter()
    config = peer.get_default_x86_inductor_quantization_config(reduce_range=reduce_range)
    with torch.no_grad():
        exported: Any = torch.export.export(model, inputs).module()
        prepared = prepare_pt2e(exported, peer.X86InductorQuantizer().set_global(config))
        for batch in calibration_of(job.place):
            prepared(*batch)
        converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)
        return _compiled(converted, inputs, f"torchao {version('torchao')}", start)


def _scheme(job: Job) -> str:
    return "dynamic" if job.model in TRANSFORMERS else "static"


def _executorch(job: Job, flow: Callable[..., programs.Program], scheme: str) -> float:
    _threads(job)
    with torch.no_grad():
        made = flow(model_of(job), inputs_of(job.place), scheme, calibration_of(job.place))
    with atomic_file(job.file(".pte")) as part:
        part.write_bytes(made.buffer)
    return made.seconds


def build_executorch_float(job: Job) -> float:
    """ExecuTorch's flow, nothing quantized."""
    return _executorch(job, programs.theirs, "float")


def build_executorch_int8(job: Job) -> float:
    """ExecuTorch's flow with its own quantizer: static, dynamic for transformers."""
    return _executorch(job, programs.theirs, _scheme(job))


def build_ours_executorch(job: Job) -> float:
    """Ours, by the same scheme."""
    return _executorch(job, programs.ours, _scheme(job))


def load_executorch(job: Job) -> Loaded:
    """A ``.pte`` in the runtime."""
    from lowering.executorch.runtime import set_threads
    from lowering.files import open_program

    set_threads(job.threads)  # before a program is loaded: it keeps the pool it finds
    program = open_program(job.file(".pte"), isolated=False)
    inputs = inputs_of(job.place)
    program.run(inputs)
    return Loaded(
        call=lambda: program.call(inputs),
        first=_first,
        version=f"executorch {version('executorch')}",
        files=(job.file(".pte"),),
    )
