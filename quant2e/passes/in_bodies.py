"""Rewrites of the bodies of control flow, each as a graph that holds its constants itself.

cond(p, f, g, [x, w])  =  cond(p, f', g', [x, w'])        f', g' and w' as a rewrite makes them
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from quant2e.graph.constants import Constants
from quant2e.graph.control_flow import bodies, control_flow, hand_constants, hold_constants


def rewrite_bodies(gm: GraphModule, rewrite: Callable[[str, GraphModule], None]) -> None:
    """Rewrite the bodies of ``gm`` in place: ``rewrite`` takes the path of one, and the graph, and changes it in place.

    Bodies of ops whose operands are not known (autocast), and the bodies in bodies, are left to the caller.
    """
    nodes = [node for node in gm.graph.nodes if control_flow(node) is not None]
    constants = frozenset(Constants(gm.graph)) if nodes else frozenset()
    for node in nodes:
        hold_constants(gm, node, constants)
        for path, body in bodies(node).items():
            rewrite(path, body)
        hand_constants(gm, node)
