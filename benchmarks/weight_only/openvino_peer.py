"""OpenVINO with `nncf.compress_weights`: rows of floats, and in int8 as it takes them by default."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.weight_only.decoders import Call, Decoder, Program


def programs(model: Decoder, ids: Tensor) -> Iterator[Program]:
    """Tables of embeddings stay as they are, as with us; all linear layers are compressed."""
    import nncf
    import openvino

    plain = openvino.convert_model(torch.export.export(model, (ids,), strict=False))
    modes = {
        "4 bits, groups of 32": {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": 32, "all_layers": True},
        "4 bits, groups of 32, symmetric": {
            "mode": nncf.CompressWeightsMode.INT4_SYM,
            "group_size": 32,
            "all_layers": True,
        },
        "8 bits, a scale per output": {"mode": nncf.CompressWeightsMode.INT8_SYM},
    }
    for weights, mode in modes.items():
        small = nncf.compress_weights(plain.clone(), ignored_scope=nncf.IgnoredScope(types=["Gather"]), **mode)
        for rows, group in (("float", 0), ("int8", None)):
            yield Program(library="OpenVINO", weights=weights, rows=rows, on=partial(_compiled, small, ids, group))


def _compiled(model: Any, ids: Tensor, group: int | None, threads: int) -> Call:
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    if group is not None:
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = group
    return partial(_step, openvino.compile_model(model, "CPU", options).create_infer_request(), ids.numpy())


def _step(request: Any, ids: Any) -> Tensor:
    (logits,) = request.infer([ids], share_inputs=True, share_outputs=True).values()
    return torch.from_numpy(logits)
