"""Our programs: float, and each recipe, through Inductor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lowering
import quant2e
from benchmarks.weight_only.decoders import Call, Decoder, Program
from quantizers import X86InductorQuantizer

RECIPES = {
    "w4-g32": ("4 bits, groups of 32", "float"),
    "w4a8-dynamic-g32": ("4 bits, groups of 32", "int8"),
    "w8": ("8 bits, a scale per output", "float"),
}


def programs(model: Decoder, ids: Tensor) -> Iterator[Program]:
    """The float program first: the one to compare outputs with."""
    captured = quant2e.capture(model, (ids,))
    yield Program(library="Inductor", weights="float", rows="float", on=partial(_lowered, captured, ids))
    for recipe, (weights, rows) in RECIPES.items():
        result = quant2e.quantize(captured, (ids,), X86InductorQuantizer().set_global(recipe), progress=False)
        yield Program(library="quant2e", weights=weights, rows=rows, on=partial(_lowered, result, ids))


def _lowered(model: Any, ids: Tensor, threads: int) -> Call:
    """Inductor writes the number of threads into the code."""
    torch.set_num_threads(threads)
    program: Any = lowering.to_inductor(model, (ids,), verify=False)
    return partial(program, ids)
