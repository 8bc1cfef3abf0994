"""Own noise: how far a Q/DQ graph is from itself when the last bits of its floats move, and the bound that allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lowering.state import Apart
from lowering.verify import Bound, Verification, verify_calls
from quant2e.graph.captured.calls import Call
from quant2e.graph.control_flow import form_in_python
from quant2e.graph.data_movement import MOVEMENTS

LAST_BIT = 2.0**-23
"""Relative size of the last bit of a float32."""

_HALVES = (torch.bfloat16, torch.float16)

NOISE_DRAWS = 4
"""How many neighbours of a graph its own noise is measured on."""

LEEWAY_DB = 6.0
"""How much more noise than its own a graph's lowered program may have: twice the amplitude."""


def own_noise_db(reference: torch.nn.Module, batches: Iterable[Call], draws: int = NOISE_DRAWS) -> float:
    """SQNR, in dB, of a graph against itself with every float that it holds or computes moved by about its last
    bit.

    Of several outputs, that of the worst.
    Where a value lies close to the middle between two integers, the last bit of a float decides which it becomes, and
    what follows sees a difference of a whole step. In a deep graph with activations quantized at many places this
    noise is far above that of float arithmetic; two correct programs that add in another order differ by it. So do two
    of which one rounds ties up and the other to even, where averages of integers make ties; and two where floats of 16
    bits are rounded behind every op in the one, and at the end of several in the other.

    Whether a given draw crosses such a middle early in the graph is luck: over six transformer layers single draws
    measure anything from 27 to 130 dB. The worst of ``draws`` is returned, which is steady.
    """
    generator = torch.Generator().manual_seed(0)
    kept = list(batches)

    def draw() -> float:
        own = Apart(reference).model
        assert isinstance(own, torch.nn.Module)
        tensors = {**dict(own.named_parameters()), **dict(own.named_buffers())}
        moved = {name: _moved(tensor.detach(), generator) for name, tensor in tensors.items()}

        def neighbour(*args: Any, **kwargs: Any) -> Any:
            with _MovedResults(generator):
                return torch.func.functional_call(own, moved, args, kwargs)

        return min((output.sqnr_db for output in verify_calls(neighbour, reference, kept).outputs), default=math.inf)

    return min(draw() for _ in range(draws))


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A copy with the last bits of floats moved."""
    if not tensor.is_floating_point():
        return tensor.clone()
    return tensor * (1 + LAST_BIT * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))


class _MovedResults(TorchDispatchMode):
    """Moves the last bits of the floats that ops compute: what is exactly between two integers may become either.

    Of floats of 16 bits one in six moves: the variance is that of the difference between two roundings, ``2 / 12`` of a
    squared step. Control flow is run in Python, so that the ops of its bodies are seen one by one; other ops that call
    functions are run as they are, and what they return is moved.
    """

    supports_higher_order_operators = True

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives this base no types
        self._generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (in_python := form_in_python(func)) is not None:
            with self:
                return in_python(*args, **(kwargs or {}))
        results = func(*args, **(kwargs or {}))
        if isinstance(func, HigherOrderOperator):
            return pytree.tree_map(self._moved, results)
        if func.namespace != "aten" or func in MOVEMENTS or any(r.alias_info is not None for r in func._schema.returns):
            return results  # integers as floats, which is exact; the same values; or another one's
        return pytree.tree_map(self._moved, results)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value.dtype not in _HALVES:
            return _moved(value, self._generator)
        draw = torch.rand(value.shape, generator=self._generator, device="cpu").to(value.device)
        bits = (draw < 1 / 12).float() - (draw > 11 / 12).float()
        return (value.float() * (1 + 0.75 * torch.finfo(value.dtype).eps * bits)).to(value.dtype)


def compare_within_noise(
    lowered: Callable[..., Any], reference: Any, batches: Sequence[Call], bound: Bound | None = None
) -> Verification:
    """`verify_calls` with the bound that the graph itself allows.

    The bound is ``bound`` (`Bound()` by default) where the program meets it. Where it does not, it is the graph's own
    noise less `LEEWAY_DB`, if that asks for less.
    """
    found = verify_calls(lowered, reference, batches, bound=bound)
    if found.passed or not isinstance(reference, torch.nn.Module):
        return found
    noise = own_noise_db(reference, batches)
    bound = Bound(steps=found.bound.steps, sqnr_db=min(found.bound.sqnr_db, noise - LEEWAY_DB))
    return replace(found, bound=bound, own_noise_db=noise)
