"""Which values XNNPACK may hold with their channels last, whatever the graph says.

ExecuTorch stores the inputs and results of convolutions and pools so, and what ops of any layout make of them, until a
view or a linear puts the channels back. Ops along an axis have to know; of those that XNNPACK takes, ExecuTorch 1.4
asks permutations, paddings, slices and concatenations, and forgets softmax, which is along the channels then. And
where one of the readers of a dequantize wants the channels back, the others get them as well.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from lowering.export import op_name
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.qdq_ops import qd

_IMAGE_OPS = tuple(
    f"aten.{name}"
    for name in (
        "conv", "upsample", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "max_pool2d", "mean", "amax",
        "max.dim", "prelu",
    )
)  # fmt: skip
"""How the names of ops begin whose results have their channels last."""

_PLAIN_OPS = tuple(
    f"aten.{name}"
    for name in ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "linear", "addmm")
)
"""And of those that take channels where the graph has them."""


def of_images(node: Node) -> bool:
    """Whether ``node``, of ATen or of its edge dialect, may have its channels last: it has four axes, and an image op,
    or an input that is stored so, is among what it is made of.
    """
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        found = waiting.pop()
        value = node_tensor(found)
        if found in seen or value is None or value.dim() != 4:
            continue
        seen.add(found)
        if found.op == "placeholder" and not value.is_contiguous():
            return True
        name = op_name(found) if found.op == "call_function" else ""
        if name.startswith(_IMAGE_OPS):
            return True
        if not name.startswith(_PLAIN_OPS):
            waiting += found.all_input_nodes
    return False


def dequantized_by_reader(module: GraphModule) -> int:
    """Give each reader of a dequantize of images its own, in place; returns how many dequantize ops had several."""
    count = 0
    for node in module.graph.find_nodes(op="call_function", target=qd.dequantize_per_tensor.default):
        _, *others = node.users or (None,)
        if not others or not of_images(node):
            continue
        for reader in others:
            with module.graph.inserting_before(reader):
                own = module.graph.node_copy(node, lambda each: each)
            reader.replace_input_with(node, own)
        count += 1
    return count
