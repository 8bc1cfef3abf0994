"""OpenVINO: models of NNCF's post-training quantization, and ours.

They are run in an environment of their own (`environment`); ours are made in that of this project, which has the extra
``openvino``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.worker import ONNX, TRANSFORMERS, Job, Loaded, arrays, calibration

CACHE = Path.home() / ".cache" / "quant2e" / "openvino"


def environment() -> Path:
    """The interpreter of OpenVINO's environment, made on first use. Raises `CalledProcessError` when pip fails."""
    python = CACHE / "bin" / "python"
    done = CACHE / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(CACHE)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "openvino", "nncf"]
        subprocess.run(pip, check=True)
        done.touch()
    return python


def _model(job: Job) -> Any:
    import openvino

    return openvino.convert_model(job.place / ONNX)


def _save(model: Any, job: Job) -> None:
    import openvino

    openvino.save_model(model, job.file(".xml"), compress_to_fp16=False)


def build_float(job: Job) -> None:
    """Read the ONNX file and write it in OpenVINO's format."""
    _save(_model(job), job)


def build_int8(job: Job) -> None:
    """``nncf.quantize`` with its defaults, told of transformers."""
    import nncf

    batches = calibration(job.place)
    kind = nncf.ModelType.TRANSFORMER if job.model in TRANSFORMERS else None
    dataset = nncf.Dataset(batches, list)
    _save(nncf.quantize(_model(job), dataset, subset_size=len(batches), model_type=kind), job)


def build_ours(job: Job) -> float:
    """Quantized by us and lowered; not verified, so that times to lower compare. Returns the seconds."""
    import time

    import lowering
    import quant2e
    from benchmarks.peers.models import calibration_of, inputs_of, model_of
    from quantizers import OpenVINOQuantizer

    model, inputs = model_of(job), inputs_of(job.place)
    start = time.perf_counter()
    prepared = quant2e.prepare_pt2e(quant2e.capture(model, inputs), OpenVINOQuantizer().set_global("w8a8"))
    quant2e.calibrate(prepared, calibration_of(job.place))
    lowering.to_openvino(quant2e.convert_pt2e(prepared), inputs, verify=False).save(job.file(".xml"))
    return time.perf_counter() - start


def load(job: Job) -> Loaded:
    """Compile the file for this CPU, for the latency of one request."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": job.threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(job.file(".xml"), "CPU", options)
    request = compiled.create_infer_request()
    inputs = list(arrays(job.place / "inputs.npz"))
    request.infer(inputs)
    return Loaded(
        call=lambda: request.infer(inputs),
        first=lambda outputs: outputs[0].copy(),
        version=f"openvino {openvino.__version__.split('-')[0]}",
        files=(job.file(".xml"), job.file(".bin")),
    )
