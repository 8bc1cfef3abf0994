"""onnxruntime: the float file that torch exports, and the int8 file that onnxruntime's own quantizer makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.worker import ONNX, TRANSFORMERS, Job, Loaded, arrays, calibration


class _Reader:
    """Calibration data, in the interface that onnxruntime reads."""

    def __init__(self, path: Path, folder: Path) -> None:
        names = [given.name for given in _session(path, 1).get_inputs()]
        self._batches: Iterator[dict[str, np.ndarray]] = (
            dict(zip(names, batch, strict=True)) for batch in calibration(folder)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, None behind the last."""
        return next(self._batches, None)


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls others are measured
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def build_int8(job: Job) -> None:
    """As onnxruntime documents it: ``quantize_static`` (QDQ, s8) after preprocessing, ``quantize_dynamic`` for
    transformers.

    Defaults, and a weight scale per channel.
    """
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    made = str(job.file(".onnx"))
    if job.model in TRANSFORMERS:
        quantize_dynamic(str(job.place / ONNX), made, per_channel=True)
        return
    CalibrationDataReader.register(_Reader)
    simplified = job.file(".simplified.onnx")
    quant_pre_process(str(job.place / ONNX), str(simplified))
    quantize_static(str(simplified), made, _Reader(simplified, job.place), per_channel=True)


def load_float(job: Job) -> Loaded:
    """The float file."""
    return _load(job, job.place / ONNX)


def load_int8(job: Job) -> Loaded:
    """The int8 file."""
    return _load(job, job.file(".onnx"))


def _load(job: Job, path: Path) -> Loaded:
    import onnxruntime

    session = _session(path, job.threads)
    names = [given.name for given in session.get_inputs()]
    feeds = dict(zip(names, arrays(job.place / "inputs.npz"), strict=True))
    session.run(None, feeds)
    return Loaded(
        call=lambda: session.run(None, feeds),
        first=lambda outputs: outputs[0],
        version=f"onnxruntime {onnxruntime.__version__}",
        files=(path,),
    )
