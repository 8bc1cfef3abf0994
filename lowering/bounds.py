"""Bounds of sizes that vary: inputs at both ends, and shape environments that keep what the author gave."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from lowering.signature import Signature
from quant2e.errors import CaptureError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.inputs import inputs_of

MOST_CORNERS = 8
"""How many combinations of smallest and largest sizes a program is compared at."""

MOST_ELEMENTS = 2**20
"""How many elements inputs at a largest size may have together, unless the example's have half as many already."""


class MadeUpCall(Call):
    """A call that no user gave: their example with ``sizes`` that the graph's bounds allow, as text."""

    sizes: str

    @classmethod
    def of(cls, call: Call, sizes: str) -> MadeUpCall:
        """``call``, marked."""
        made = cls(*call)
        made.sizes = sizes
        return made


def corners(signature: Signature, values: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """Values of the sizes that vary to compare at: each as small as it may be, and as large. ``values``: flat inputs.

    Instead of a largest size whose inputs would be too large to run on: 64, twice the example's, or the example's own.
    """
    elements = sum(value.numel() for value in values if isinstance(value, Tensor))
    most = max(MOST_ELEMENTS, 2 * elements)
    ends = []
    for size, (low, high) in zip(signature.sizes(values), signature.symbols.values(), strict=True):
        candidates = (min(high, limit) for limit in (high, 64, 2 * size, size))
        largest = next(n for n in candidates if elements * n <= most * max(size, 1))
        ends.append(tuple(dict.fromkeys((int(max(low, 1)), int(largest)))))
    return tuple(itertools.islice(itertools.product(*ends) if ends else (), MOST_CORNERS))


def calls_at_bounds(
    signature: Signature, example: Call, reference: Any, wanted: Callable[[Sequence[int]], bool] = bool
) -> list[Call]:
    """``example`` with the sizes of each corner that is ``wanted``, and that the ``reference`` takes.

    A graph that was captured with fixed sizes can be lowered for sizes that vary; it can be compared at its own only.
    """
    values = signature.flatten(*example)
    found = (
        MadeUpCall.of(
            signature.structured(signature.resized(values, sizes)),
            ", ".join(f"{name} = {size}" for name, size in zip(signature.symbols, sizes, strict=True)),
        )
        for sizes in filter(wanted, corners(signature, values))
    )
    return [call for call in found if _takes(reference, call)]


def _takes(reference: Any, call: Call) -> bool:
    """Whether a graph was captured for such inputs."""
    if not isinstance(reference, GraphModule):
        return True
    try:
        inputs_of(reference).check(*call)
    except CaptureError:
        return False
    return True


@contextmanager
def kept_ranges(programs: Iterable[ExportedProgram]) -> Iterator[None]:
    """Keep the bounds of sizes inside of the block, whatever a pass takes for granted on the example.

    Which kernel torch's convolution would choose, for one, depends on whether a batch is below 16: asking narrows the
    batch to that, and memory would be planned for no more.
    """
    environments = {
        id(env): env for program in programs for env in _environments(program) if "_refine_ranges" not in vars(env)
    }
    for env in environments.values():
        env._refine_ranges = _nothing
    try:
        yield
    finally:
        for env in environments.values():
            del env._refine_ranges


def _nothing(expr: Any) -> None:
    pass


def _environments(program: ExportedProgram) -> Iterator[Any]:
    """The shape environments of the sizes in a program."""
    for node in program.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            sizes = leaf.shape if isinstance(leaf, Tensor) else (leaf,)
            yield from (size.node.shape_env for size in sizes if isinstance(size, SymInt))
