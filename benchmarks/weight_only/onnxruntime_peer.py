"""onnxruntime with MatMulNBits: rows of floats (accuracy level 1), and in int8 (level 4)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.weight_only.decoders import Call, Decoder, Program


def programs(model: Decoder, ids: Tensor) -> Iterator[Program]:
    """4 bits with zero points in groups of 32, and 8 bits in the same groups: the op knows no scale per output."""
    import onnx

    folder = tempfile.TemporaryDirectory()  # goes with the last of the programs
    plain = Path(folder.name) / "decoder.onnx"
    torch.onnx.export(model, (ids,), plain, dynamo=True, external_data=True, verbose=False)
    for bits in (4, 8):
        for rows, level in (("float", 1), ("int8", 4)):
            path = plain.with_stem(f"{bits}-{level}")
            made = _quantized(onnx.load(plain), bits, level)
            onnx.save(made, path, save_as_external_data=True, location=f"{path.stem}.data")
            weights = f"{bits} bits, groups of 32"
            yield Program(library="onnxruntime", weights=weights, rows=rows, on=partial(_opened, folder, path, ids))


def _quantized(model: Any, bits: int, level: int) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False, accuracy_level=level, bits=bits)
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    return quantizer.model.model


def _opened(_folder: Any, path: Path, ids: Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return partial(_step, session, {session.get_inputs()[0].name: ids.numpy()})


def _step(session: Any, inputs: Any) -> Tensor:
    (logits,) = session.run(None, inputs)
    return torch.from_numpy(logits)
