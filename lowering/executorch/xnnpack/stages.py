"""Partition stages: which ops can share a delegate, in as few delegates as the ops between them allow.

The stage of an op counts how often the work changes hands on the way to it: it is the largest stage among its
inputs, plus one where an op outside of the delegate reads what a delegate made. All delegated ops of one stage can
run in one delegate, since any path that leaves the stage and returns would have raised the stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Graph, Node


def stages(graph: Graph, groups: Sequence[Iterable[Node]]) -> list[list[Node]] | None:
    """Partition the delegated ops of a graph into stages, each in graph order.

    ``groups``: disjoint sets of nodes that a backend takes, each only as a whole; nodes of no group stay outside.
    Time is linear in the graph for groups that are contiguous in it. None when a group encloses a node it depends
    on and feeds, so that no order of delegates exists.
    """
    group_of = {node: index for index, group in enumerate(groups) for node in group}
    stage = dict.fromkeys(graph.nodes, 0)
    group_stage = [0] * len(groups)
    limit = len(groups) + 1
    changed = True
    while changed:
        changed = False
        for node in graph.nodes:
            group = group_of.get(node)
            level = _level(node, stage, group_of)
            if group is not None:
                if level > group_stage[group]:
                    group_stage[group] = level
                    changed = True
                level = group_stage[group]
            if level > stage[node]:
                stage[node] = level
                changed = True
            if level > limit:
                return None
    members: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node in group_of:
            members.setdefault(group_stage[group_of[node]], []).append(node)
    return [members[level] for level in sorted(members)]


def _level(node: Node, stage: dict[Node, int], group_of: dict[Node, int]) -> int:
    outside = node not in group_of
    # inputs and weights are there from the start, wherever they are used
    computed = [source for source in node.all_input_nodes if source.op == "call_function"]
    return max((stage[source] + (outside and source in group_of) for source in computed), default=0)
