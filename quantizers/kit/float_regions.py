"""Float regions: elementwise ops between float ops, and behind a detector's last convolution, are left in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.fx import Graph, Node

from quant2e.graph.constants import Constants


def stands_between_float_ops(
    node: Node, constants: Constants, passes: Callable[[Node], bool], floats: Callable[[Node], bool]
) -> bool:
    """Whether all that an elementwise op reads comes from float ops, and all that reads it are float ops.

    Quantizing it alone would cost a conversion on each side. ``passes``: ops to look through, which would be quantized
    together with this one: elementwise ones, and those that move values. ``floats``: ops that stay in float.
    """
    sources = _ends(node, lambda n: [o for o in n.all_input_nodes if o not in constants], passes)
    if not all(source.op == "call_function" and floats(source) for source in sources):
        return False
    readers = _ends(node, lambda n: list(n.users), passes)
    return all(reader.op == "output" or floats(reader) for reader in readers)


def _ends(start: Node, neighbours: Callable[[Node], list[Node]], passes: Callable[[Node], bool]) -> Iterator[Node]:
    """The first nodes in one direction that cannot be looked through."""
    pending, seen = [start], {start}
    while pending:
        for node in neighbours(pending.pop()):
            if node in seen:
                continue
            seen.add(node)
            if passes(node):
                pending.append(node)
            else:
                yield node


def float_tail(graph: Graph, products: Callable[[Node], bool], mixes: Callable[[Node], bool]) -> dict[Node, Node]:
    """Ops behind the last product, from the first one on that mixes ranges: node → that first op.

    Box decoding multiplies sigmoids by strides and adds grids: coordinates of hundreds of pixels next to probabilities,
    which no scale of 256 steps holds. ``products``: convolutions and linears; ``mixes``: elementwise ops of two
    tensors, or a tensor and a number. A graph without a product has no tail.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    if not any(products(node) for node in nodes):
        return {}
    leads_to_product: set[Node] = set()
    behind_product: set[Node] = set()
    for node in reversed(nodes):
        if products(node) or any(user in leads_to_product for user in node.users):
            leads_to_product.add(node)
    begins: dict[Node, Node] = {}
    for node in nodes:
        operands = node.all_input_nodes
        if products(node) or any(operand in behind_product for operand in operands):
            behind_product.add(node)
        if node in leads_to_product or node not in behind_product:
            continue
        first = next((begins[operand] for operand in operands if operand in begins), None)
        if first is None and mixes(node):
            first = node
        if first is not None:
            begins[node] = first
    return begins
