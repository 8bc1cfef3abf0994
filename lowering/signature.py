"""What a lowered program takes and returns: structure, sizes and dtypes, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from quant2e.errors import LoweringError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInput:
    """One tensor that goes in: its dtype, and each size as the least and the largest it may be."""

    name: str
    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        sizes = ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in self.sizes)
        return f"'{self.name}': {str(self.dtype).removeprefix('torch.')}[{sizes}]"

    def takes(self, value: object) -> bool:
        """Whether a value is such a tensor."""
        return (
            isinstance(value, Tensor)
            and value.dtype is self.dtype
            and value.dim() == len(self.sizes)
            and all(low <= size <= high for size, (low, high) in zip(value.shape, self.sizes, strict=True))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Structure of inputs ``((positional…), {keyword: …})`` and of outputs, and the tensors at the inputs' leaves.

    A leaf that is not a tensor is None in ``tensors``: it was fixed when the program was made.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    tensors: tuple[TensorInput | None, ...]

    def flatten(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The inputs as a flat list of contiguous tensors; keywords in any order. Raises `LoweringError`."""
        keywords = list(self.in_spec.children()[1].context)
        if set(kwargs) != set(keywords):
            raise LoweringError(f"this program takes the keywords {keywords}, not {list(kwargs)}")
        flat, spec = pytree.tree_flatten((tuple(args), {name: kwargs[name] for name in keywords}))
        if spec != self.in_spec:
            raise LoweringError(f"inputs of another structure: this program takes {self.in_spec}, not {spec}")
        for expected, value in zip(self.tensors, flat, strict=True):
            if expected is not None and not expected.takes(value):
                got = f"{str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise LoweringError(f"this program takes {expected}, not {got}")
        return [value.detach().contiguous() if isinstance(value, Tensor) else value for value in flat]


def signature_of(exported: ExportedProgram) -> Signature:
    """What an exported program takes and returns."""
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    assert in_spec is not None
    assert out_spec is not None
    names = set(exported.graph_signature.user_inputs)
    values = [node for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]
    tensors = []
    for node in values:
        value = node.meta.get("val")
        sizes = tuple(_range(exported, size) for size in value.shape) if isinstance(value, Tensor) else ()
        tensors.append(
            TensorInput(name=node.name, dtype=value.dtype, sizes=sizes) if isinstance(value, Tensor) else None
        )
    # constants that torch.export drops from the signature are leaves without a placeholder
    tensors += [None] * (in_spec.num_leaves - len(tensors))
    return Signature(in_spec=in_spec, out_spec=out_spec, tensors=tuple(tensors))


def check_bounded(exported: ExportedProgram) -> None:
    """Raise `LoweringError` naming every dynamic size of an input that has no upper bound: memory is planned for it."""
    from torch.utils._sympy.numbers import int_oo  # loads sympy, which importing lowering does not

    names = set(exported.graph_signature.user_inputs)
    open_ended = [
        f"dimension {dim} of '{node.name}'"
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in names and isinstance(node.meta.get("val"), Tensor)
        for dim, size in enumerate(node.meta["val"].shape)
        if isinstance(size, SymInt) and _upper(exported, size) == int_oo
    ]
    if open_ended:
        raise LoweringError(
            f"{', '.join(open_ended)} may be of any size, and the target plans memory for the largest: give an upper bound, "
            f'as in dynamic_shapes=({{{0}: torch.export.Dim("batch", max=64)}},)'
        )


def _upper(exported: ExportedProgram, size: SymInt) -> Any:
    found = exported.range_constraints.get(size.node.expr)
    return found.upper if found is not None else size.node.shape_env.bound_sympy(size.node.expr).upper


def _range(exported: ExportedProgram, size: int | SymInt) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    found = exported.range_constraints.get(size.node.expr)
    # int_oo, the bound of a size without one, has no int; ExecuTorch refuses such programs before they are called
    return (int(found.lower), int(found.upper)) if found is not None else (0, torch.iinfo(torch.int64).max)
