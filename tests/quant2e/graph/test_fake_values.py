"""What a node produces, read from its fake value: floats, sizes."""

import pytest
import torch
from torch.fx import Graph

from quant2e.graph.fake_values import FakeValueCache, example_shape, is_float


class Sums(torch.nn.Module):
    def forward(self, x, i):
        first, second = x.split(2, 1)
        return first + second, i + 1, x.shape[0]


@pytest.fixture(scope="module")
def nodes():
    batch = torch.export.Dim("batch", min=2)
    example = (torch.randn(3, 4), torch.arange(3))
    graph = torch.export.export(Sums(), example, dynamic_shapes=({0: batch}, {0: batch})).graph
    return {node.name: node for node in graph.nodes}


@pytest.mark.parametrize(
    ("name", "floats", "shape"),
    [
        ("x", True, (3, 4)),
        ("i", False, (3,)),
        ("split", True, None),
        ("add", True, (3, 2)),
        ("add_1", False, (3,)),
        ("sym_size_int_2", False, None),
        ("output", False, None),
    ],
)
def test_read_from_the_fake_value(nodes, name, floats, shape):
    assert (is_float(nodes[name]), example_shape(nodes[name])) == (floats, shape)


def test_no_node_and_no_record():
    assert not is_float(1.5)
    assert example_shape(None) is None
    assert not is_float(Graph().placeholder("x"))


def test_a_tensor_of_the_module_needs_no_record():
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.zeros(2, 3))
    graph = Graph()
    read = graph.get_attr("w")
    graph.output(read)
    gm = torch.fx.GraphModule(module, graph)
    (node, _) = gm.graph.nodes
    assert is_float(node)
    assert example_shape(node) == (2, 3)


def test_values_whose_strides_alone_vary():
    """``x[:, 0]`` of a sequence has a fixed shape, and the length in its strides."""

    class Picks(torch.nn.Module):
        def forward(self, x):
            return x[:, 0]

    shapes = ({1: torch.export.Dim("length", min=2)},)
    graph = torch.export.export(Picks(), (torch.randn(3, 4, 5),), dynamic_shapes=shapes).graph
    value = next(node.meta["val"] for node in graph.nodes if "select" in node.name)
    assert type(value.stride()[0]) is not int
    assert FakeValueCache()(value, torch.int8).dtype is torch.int8
