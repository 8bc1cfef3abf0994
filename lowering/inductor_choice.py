"""Give each quantized product of a graph to the engine that is fastest for its shape.

    op(dq(x), dq(w))        =>        op(dq(x), w')        where a float kernel is faster, or no int8 kernel is right

``w'`` is a float constant. The float op computes on the same numbers as the Q/DQ graph does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.engines import ENGINES, Choice, Engine, Product, fastest
from lowering.inductor_graph import operands
from lowering.inductor_guard import is_weight_only, quantized_operands
from lowering.inductor_weights import CONVOLUTION, activation_of, float_weight, weight_of
from quant2e.dialect import QUANTIZE, qd
from quant2e.errors import LoweringError

aten = torch.ops.aten

Engines = str | Mapping[str, str]
"""``"measured"``, the name of an engine, or a name for each op."""

_FLOAT = "float"


def choose(gm: GraphModule, refused: Mapping[str, str], wanted: Engines) -> tuple[dict[str, Choice], int]:
    """Choose for every product, and rewrite those that a float kernel computes.

    ``refused``: ops that no int8 kernel computes right. They and weight-only ops get a float weight without being
    measured: the alternative is to dequantize the weight at every call. Returns the choices by op name, and the bytes of float weights made. Raises `LoweringError` for names of engines or ops that
    do not exist.
    """
    names = [engine.name for engine in ENGINES]
    products = {node.name: node for node in gm.graph.nodes if quantized_operands(node) is not None}
    _check(wanted, names, products)
    alone = [node for node in gm.graph.nodes if node.name in refused or is_weight_only(gm, node)]
    size = sum(float_weight(gm, node) for node in alone)
    choices: dict[str, Choice] = {}
    for name, node in products.items():
        product = product_of(node)
        if product is None:
            continue
        choices[name] = _choice(name, product, wanted, ENGINES)
        if choices[name].engine == _FLOAT:
            size += float_weight(gm, node)
    return choices, size


def _choice(name: str, product: Product, wanted: Engines, engines: Sequence[Engine]) -> Choice:
    if wanted == "measured":
        return fastest(product, engines)
    named = wanted if isinstance(wanted, str) else wanted.get(name)
    return fastest(product, engines) if named is None else Choice(engine=named, product=product, seconds={})


def _check(wanted: Engines, names: Sequence[str], products: Mapping[str, Node]) -> None:
    given = {wanted} - {"measured"} if isinstance(wanted, str) else set(wanted.values())
    if unknown := sorted(given - set(names)):
        raise LoweringError(f"there is no engine '{unknown[0]}': give 'measured', or one of {', '.join(names)}")
    if not isinstance(wanted, str) and (missing := sorted(set(wanted) - set(products))):
        raise LoweringError(
            f"engines names the op '{missing[0]}', and the graph has no such quantized product; it has "
            f"{', '.join(sorted(products)) or 'none'}"
        )


def product_of(node: Node) -> Product | None:
    """The shape of a linear layer or a two-dimensional convolution; None for what the engines do not know.

    A size that may vary counts with the value it was captured with.
    """
    x, weight, bias = _shape(activation_of(node)), _shape(weight_of(node)), operands(node).get("bias")
    if x is None or weight is None:
        return None
    integers = _becomes_integers(node)
    if node.target not in CONVOLUTION:
        outputs_first = weight if node.target is aten.linear.default else weight[::-1]
        if len(weight) != 2 or x[-1] != outputs_first[1]:
            return None
        return Product(
            x=(torch.Size(x[:-1]).numel(), x[-1]), weight=outputs_first, bias=bias is not None, integers=integers
        )
    args, spatial = operands(node), len(weight) - 2
    padding = args["padding"]
    if spatial != 2 or len(x) != 4 or isinstance(padding, str):
        return None
    return Product(
        x=x,
        weight=weight,
        stride=_each(args["stride"], spatial),
        padding=_each(padding, spatial),
        dilation=_each(args["dilation"], spatial),
        groups=args["groups"],
        bias=bias is not None,
        integers=integers,
    )


def _each(value: Sequence[int], spatial: int) -> tuple[int, ...]:
    return tuple(value) * spatial if len(value) == 1 else tuple(value)


def _shape(node: Node | None) -> tuple[int, ...] | None:
    value: Any = node.meta.get("val") if node is not None else None
    if not isinstance(value, Tensor):
        return None
    sizes: tuple[Any, ...] = tuple(value.shape)  # ints, and symbols for dynamic dimensions
    return tuple(size if isinstance(size, int) else int(size.node.hint or 1) for size in sizes)


def _becomes_integers(node: Node) -> bool:
    """Whether the result, perhaps activated, is quantized: then an int8 kernel writes integers itself."""
    for _ in range(2):
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
        if node.target in QUANTIZE and node.target is not qd.quantize_per_tensor.tensor:
            return True
    return False
