"""Two forms of a batch norm that is trained with quantization: beside its op, or folded into that op's weight and bias.

    result = norm(tail(mac(x, w1, b1)))        in training
    result = mac(x, w2, b2)                    where the norm keeps its statistics, as conversion folds it

`quant2e.passes.train_batch_norm` writes both into one graph and records here, on the norm, how to go from the one to
the other. The nodes that a form does not read stay in the graph, and compute on a value per channel only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node

from quant2e.errors import Quant2eError
from quant2e.graph.dataflow import set_operand

_FORMS = "quant2e_norm_forms"
"""Key in a batch norm's metadata, with plain data: see `record_forms`."""


def record_forms(
    norm: Node, mac: Node, result: Node, operands: Sequence[tuple[Node, str, Node | None, Node | None]]
) -> None:
    """Note on ``norm`` what differs between its forms.

    ``result``: what is read in place of ``mac`` in training. ``operands``: node, name of its operand, and what that is
    in training and in evaluation.
    """
    named = [[node.name, name, *(None if n is None else n.name for n in both)] for node, name, *both in operands]
    norm.meta[_FORMS] = {"mac": mac.name, "result": result.name, "operands": named}


def has_forms(norm: Node) -> bool:
    """Whether a batch norm has two forms."""
    return _FORMS in norm.meta


def set_form(norm: Node, training: bool, nodes: Mapping[str, Node]) -> None:
    """Give a norm that has two forms the one for training, or the other. ``nodes``: those of its graph, by name.

    Raises `Quant2eError` when some of them are gone.
    """
    forms = norm.meta[_FORMS]
    mac, result = _find(norm, forms["mac"], nodes), _find(norm, forms["result"], nodes)
    if training:
        mac.replace_all_uses_with(result)
    else:
        result.replace_all_uses_with(mac)
    for node, name, *both in forms["operands"]:
        chosen = both[0] if training else both[1]
        set_operand(_find(norm, node, nodes), name, None if chosen is None else _find(norm, chosen, nodes))


def _find(norm: Node, name: Any, nodes: Mapping[str, Node]) -> Node:
    if name not in nodes:
        raise Quant2eError(
            f"the prepared graph was edited: '{name}', with which the batch norm '{norm.name}' is trained, is gone. "
            "Use the graph as prepare_qat_pt2e made it, trained or not."
        )
    return nodes[name]
