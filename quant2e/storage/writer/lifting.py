"""Lifting: the tensors that a graph reads from its module become inputs of the program, under names of their own.

    get_attr layer.weight     =>    p_layer_weight, a parameter named "layer.weight"
    get_attr a layer.weight   =>    p_a_layer_weight, a parameter named "a_layer.weight"

A file spells paths in plain ASCII, and no part of one is a word of Python: readers put them into source text.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn
from torch.fx import GraphModule

from quant2e.graph.attributes import attribute


class Kind(Enum):
    """What a module holds a tensor as; its value is the first letter of the name of the input, as torch gives it."""

    PARAMETER = "p"
    BUFFER = "b"
    CONSTANT = "c"


@dataclass(frozen=True, slots=True)
class Lifted:
    """A tensor of a module, and the name of the input that stands for it. ``source``: where the module holds it;
    ``path``: where the program in the file does.
    """

    name: str
    source: str
    path: str
    tensor: Tensor
    kind: Kind
    persistent: bool = True

    @property
    def is_weight(self) -> bool:
        """Whether it is part of the state dict; otherwise it is a constant of the program."""
        return self.kind is Kind.PARAMETER or (self.kind is Kind.BUFFER and self.persistent)


def lifted_tensors(gm: GraphModule) -> tuple[Lifted, ...]:
    """Parameters, buffers and constants of ``gm``, in that order: all that it has, and all that its graph reads."""
    taken, paths = {node.name for node in gm.graph.nodes}, set[str]()
    found = sorted(_held(gm), key=lambda item: "pbc".index(item[1].value))
    volatile = set(_volatile_buffers(gm))
    return tuple(
        Lifted(
            free_name(re.sub(r"\W", "_", f"{kind.value}_{source}", flags=re.ASCII), taken),
            source,
            free_name(".".join(map(_plain, source.split("."))), paths),
            tensor,
            kind,
            source not in volatile,
        )
        for source, kind, tensor in found
    )


def _held(gm: GraphModule) -> Iterator[tuple[str, Kind, Tensor]]:
    seen = set()
    for kind, tensors in (
        (Kind.PARAMETER, gm.named_parameters(remove_duplicate=False)),
        (Kind.BUFFER, gm.named_buffers(remove_duplicate=False)),
        (Kind.CONSTANT, _constants(gm)),
    ):
        for path, tensor in tensors:
            if path not in seen:
                seen.add(path)
                yield path, kind, tensor


def _constants(gm: GraphModule) -> Iterable[tuple[str, Tensor]]:
    """Tensors that the graph reads and that are plain attributes of a module."""
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(tensor := attribute(gm, str(node.target), None), Tensor):
            yield str(node.target), tensor


def _volatile_buffers(module: nn.Module) -> Iterator[str]:
    """Paths of the buffers that are no part of the state dict."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        yield from (f"{prefix}.{name}" if prefix else name for name in owner._non_persistent_buffers_set)


def _plain(part: str) -> str:
    """A part of a path in plain ASCII: an identifier, or the key of a module list or dict."""
    plain = re.sub(r"[^A-Za-z0-9_:/+-]|^(?=[:/+-])", "_", part)
    if plain.startswith("__") and plain.endswith("__"):
        plain = plain.strip("_") or "x"
    return f"{plain}_" if keyword.iskeyword(plain) else plain


def free_name(name: str, taken: set[str]) -> str:
    """``name``, or with a number the first that is not taken; it then is."""
    free, number = name, 0
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free
