"""Kernel selection: each quantized product goes to the engine that is fastest for its shape.

    op(dq(x), dq(w))        =>        op(dq(x), w')        where a float kernel is faster, or no int8 kernel is right

``w'`` is a float constant. The float op computes on the same numbers as the Q/DQ graph does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.inductor.guard import dequantize_behind, is_weight_only, quantized_operands
from lowering.inductor.kernels.engines import ENGINES, WEIGHT_ONLY, Engine, KernelChoice, Product, fastest
from lowering.inductor.kernels.transposed import TransposedConvolution, is_transposed
from lowering.inductor.rewrites.weight_only import Rows, compute_by_rows, rows_of
from lowering.inductor.rewrites.weights import ACTIVATION_DQ, CONVOLUTION, activation_of, float_weight, weight_of
from lowering.native.engine import NATIVE, Native, products_together
from lowering.native.units.values import integers_of
from quant2e.cpu import detect
from quant2e.errors import LoweringError
from quant2e.graph.attributes import tensor_at
from quant2e.graph.constants import Constants
from quant2e.graph.dataflow import operands
from quant2e.graph.qdq_ops import QUANTIZE, qd
from quant2e.passes import run
from quant2e.passes.dead_code import remove_dead_code

aten = torch.ops.aten

Engines = str | Mapping[str, str]
"""``"measured"``, the name of an engine, or a name for each op."""

WITH_NATIVE: tuple[Engine, ...] = (Native(), *ENGINES)
"""In order of preference, where int8 regions can be cut out of the graph."""

_FLOAT, _ONEDNN, _MEASURED = "float", "onednn", "measured"


@dataclass(frozen=True, slots=True)
class ChosenKernels:
    """Give each op what it was decided to run with: a float weight, or for `Rows` our own kernel. A pass."""

    decisions: tuple[tuple[Node, Rows | None], ...]

    @property
    def __name__(self) -> str:
        return "chosen_kernels"

    def __call__(self, gm: GraphModule) -> int:
        """Returns how many ops there are; what they read before stays for dead code elimination."""
        for node, rows in self.decisions:
            if rows is None:
                float_weight(gm, node)
            else:
                compute_by_rows(gm, node, rows)
        return len(self.decisions)


def choose(
    gm: GraphModule, refused: Mapping[str, str], wanted: Engines, engines: Sequence[Engine] = ENGINES
) -> tuple[dict[str, KernelChoice], int]:
    """Choose among ``engines`` for every product, and rewrite those that a float kernel, or one of ours, computes.

    ``refused``: ops that no int8 kernel computes right. They get a float weight without being measured: the alternative
    is to dequantize the weight at every call. A weight that is not constant stays as it is. Returns the choices by op
    name, and the bytes of float weights made. Raises `LoweringError` for names of engines or ops that do not exist.
    """
    choices, decisions = _decide(gm, refused, wanted, engines)
    run(gm, (ChosenKernels(decisions), remove_dead_code), compiled=False)
    made = (tensor_at(gm, weight_of(node)) for node, rows in decisions if rows is None)
    return choices, sum(weight.nbytes for weight in made if weight is not None)


def _decide(
    gm: GraphModule, refused: Mapping[str, str], wanted: Engines, engines: Sequence[Engine]
) -> tuple[dict[str, KernelChoice], tuple[tuple[Node, Rows | None], ...]]:
    """The choices by op name, and the ops to rewrite: with None for a float weight."""
    constants = Constants(gm.graph)
    nodes = [node for node in gm.graph.nodes if weight_of(node) in constants]
    products = {node.name: node for node in nodes if quantized_operands(node) is not None}
    alone = {node.name: node for node in nodes if node.name not in refused and is_weight_only(gm, node)}
    _check(wanted, engines, {**products, **alone})
    choices: dict[str, KernelChoice] = {}
    decisions: list[tuple[Node, Rows | None]] = [(node, None) for node in nodes if node.name in refused]
    for name, node in alone.items():
        rows = rows_of(gm, node)
        if rows is not None:
            choices[name] = _choice(name, rows.product, wanted, engines)
        decisions.append((node, None if rows is None or choices[name].engine == _FLOAT else rows))
    for name, node in products.items():
        product = product_of(node) if name not in refused else None
        if product is None:
            continue
        choices[name] = _choice(name, product, wanted, engines)
        if choices[name].engine == _FLOAT:
            decisions.append((node, None))
    return choices, tuple(decisions)


def choose_native(
    gm: GraphModule, wanted: Engines, engines: Sequence[Engine] = WITH_NATIVE
) -> tuple[Mapping[str, KernelChoice], Engines]:
    """Choose the engine of every product of ``gm`` that our own kernels may compute, before regions are cut.

    Returns the choices by op name, and what is then asked for the ops that are in no region. Raises `LoweringError` as
    `choose` does.
    """
    constants = Constants(gm.graph)
    nodes = {node.name: node for node in gm.graph.nodes if weight_of(node) in constants}
    quantized = {name: node for name, node in nodes.items() if _has_integers(node)}
    alone = {name: node for name, node in nodes.items() if is_weight_only(gm, node)}
    _check(wanted, engines, {**quantized, **alone})
    if isinstance(wanted, str) and wanted not in (_MEASURED, NATIVE):
        return {}, wanted
    found = {}
    for name, node in quantized.items():
        if (product := product_of(node)) is not None:
            product = replace(product, together=_together(gm, node))
            found[name] = _choice(name, product, wanted, engines)
    rest = _MEASURED if isinstance(wanted, str) else {name: e for name, e in wanted.items() if e != NATIVE}
    return found, rest


def _together(gm: GraphModule, node: Node) -> int:
    """`Product.together` of a product as it stands in a Q/DQ graph."""
    weight, activation = dequantize_behind(weight_of(node)), dequantize_behind(activation_of(node))
    value, x = tensor_at(gm, weight.args[0]) if weight is not None else None, integers_of(activation)
    if value is None or value.dtype is not torch.int8 or x is None:
        return 1
    if is_transposed(node):
        value = TransposedConvolution.of(node, tuple(value.shape)).plain_weight(value)
    elif node.target not in CONVOLUTION and node.target is not aten.linear.default:
        value = value.t()
    return products_together(value, x)


def _exact(engines: Sequence[Engine], product: Product) -> tuple[Engine, ...]:
    """The engines without oneDNN where its products may saturate; those of depthwise convolutions are exact."""
    wrong = detect().saturates and product.together == 1 and product.groups != product.weight[0]
    return tuple(engine for engine in engines if not (wrong and engine.name == _ONEDNN))


def _has_integers(node: Node) -> bool:
    """Whether both operands of a product are dequantized; a weight with one scale has one per channel later on."""
    weight, activation = dequantize_behind(weight_of(node)), dequantize_behind(activation_of(node))
    scaled = weight is not None and weight.target in (
        qd.dequantize_per_channel.default,
        qd.dequantize_per_tensor.default,
    )
    return scaled and activation is not None and activation.target in ACTIVATION_DQ


def _choice(name: str, product: Product, wanted: Engines, engines: Sequence[Engine]) -> KernelChoice:
    named = wanted if isinstance(wanted, str) else wanted.get(name, _MEASURED)
    if named == _MEASURED and product.varies:
        # reads the integers whatever the number: a float copy would be measured for the example alone
        reads = next((engine for engine in engines if engine.name == WEIGHT_ONLY and engine.computes(product)), None)
        if reads is not None:
            return KernelChoice(engine=reads.name, product=product, seconds={})
    if named == _MEASURED:
        return fastest(product, _exact(engines, product))
    (engine,) = (engine for engine in engines if engine.name == named)
    if engine.computes(product):
        return KernelChoice(engine=named, product=product, seconds={})
    if not isinstance(wanted, str):
        raise LoweringError(f"engines gives '{name}' to '{named}', which cannot compute a {product}")
    return fastest(product, _exact(engines, product))  # the engine for all, which knows nothing of this kind


def _check(wanted: Engines, engines: Sequence[Engine], products: Mapping[str, Node]) -> None:
    names = [engine.name for engine in engines]
    given = {wanted} - {_MEASURED} if isinstance(wanted, str) else set(wanted.values())
    if unknown := sorted(given - set(names)):
        raise LoweringError(f"there is no engine '{unknown[0]}': give '{_MEASURED}', or one of {', '.join(names)}")
    if not isinstance(wanted, str) and (missing := sorted(set(wanted) - set(products))):
        raise LoweringError(
            f"engines names the op '{missing[0]}', and the graph has no such quantized product; it has "
            f"{', '.join(sorted(products)) or 'none'}"
        )


def product_of(node: Node) -> Product | None:
    """The shape of a linear layer or a convolution; None for what the engines do not know.

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
    return _convolution(node, x, weight, bias is not None, integers)


def _convolution(node: Node, x: tuple[int, ...], weight: tuple[int, ...], bias: bool, integers: bool) -> Product | None:
    args, spatial = operands(node), len(weight) - 2
    padding = args["padding"]
    if is_transposed(node):
        sizes = TransposedConvolution.of(node, weight)
        if spatial == 1:  # computed in two dimensions
            x, weight = (*x[:2], 1, x[2]), (*weight[:2], 1, weight[2])
        return Product(
            x=x,
            weight=weight,
            stride=sizes.stride,
            padding=sizes.padding,
            dilation=sizes.dilation,
            groups=sizes.groups,
            output_padding=sizes.output_padding,
            bias=bias,
            integers=integers,
        )
    if spatial not in (1, 2, 3) or len(x) != spatial + 2 or isinstance(padding, str):
        return None
    stride, padding, dilation = (_each(sizes, spatial) for sizes in (args["stride"], padding, args["dilation"]))
    if spatial == 1:  # computed in two dimensions
        x, weight = (*x[:2], 1, x[2]), (*weight[:2], 1, weight[2])
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    return Product(
        x=x,
        weight=weight,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=args["groups"],
        bias=bias,
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
