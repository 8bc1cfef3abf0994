import pytest
from torch.fx import Graph

from lowering.executorch.xnnpack.stages import stages


def chain(edges):
    """A graph of the nodes ``name: inputs``, in order; a node without inputs is a placeholder."""
    graph, nodes = Graph(), {}
    for name, inputs in edges.items():
        nodes[name] = (
            graph.call_function(max, tuple(nodes[i] for i in inputs), name=name) if inputs else graph.placeholder(name)
        )
    return graph, nodes


@pytest.mark.parametrize(
    ("edges", "taken", "expected"),
    [
        ({"x": "", "a": "x", "b": "a"}, ["a", "b"], [["a", "b"]]),
        # the op between them is outside, so two delegates are the least
        ({"x": "", "a": "x", "u": "a", "b": "u"}, ["a", "b"], [["a"], ["b"]]),
        # a side branch outside does not cut the main line
        ({"x": "", "a": "x", "u": "x", "b": "au"}, ["a", "b"], [["a", "b"]]),
        # c could run with a; only b has to wait for u
        ({"x": "", "a": "x", "u": "a", "b": "u", "c": "x"}, ["a", "b", "c"], [["a", "c"], ["b"]]),
        # d reads both a and what u made of a: it waits, and e with it
        ({"x": "", "a": "x", "u": "a", "d": "au", "e": "d"}, ["a", "d", "e"], [["a"], ["d", "e"]]),
        ({"x": "", "u": "x"}, [], []),
        # a shared weight belongs to whoever claims it, and delays nobody
        ({"x": "", "w": "", "a": "xw", "u": "a", "b": "uw"}, ["a", "bw"], [["a"], ["w", "b"]]),
        # a group is taken whole: a waits for its partner b
        ({"x": "", "a": "x", "c": "x", "u": "c", "b": "u"}, ["ab", "c"], [["c"], ["a", "b"]]),
    ],
)
def test_as_few_stages_as_the_ops_between_allow(edges, taken, expected):
    graph, nodes = chain(edges)
    found = stages(graph, [[nodes[name] for name in group] for group in taken])
    assert [[node.name for node in stage] for stage in found] == expected


def test_a_group_around_an_outside_op_has_no_order():
    graph, nodes = chain({"x": "", "a": "x", "u": "a", "b": "u"})
    assert stages(graph, [[nodes["a"], nodes["b"]]]) is None
