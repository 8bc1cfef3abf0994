"""The small functions of PT2E for quantizers in Python."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant2e import QuantizationSpec, capture
from quant2e.annotation.helpers import (
    WrapperModule,
    annotate_input_qspec_map,
    annotate_output_qspec,
    get_module_name_filter,
    model_is_exported,
)
from quant2e.annotation.partitions import (
    bfs_trace_with_node_process,
    find_sequential_partitions,
    get_equivalent_types,
    update_equivalent_types_dict,
)
from quant2e.annotation.specs import ANNOTATION


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
        self.head = nn.Conv2d(2, 2, 1)
        self.clamp = nn.ReLU6()

    def forward(self, x):
        return self.clamp(self.head(self.block(x)))


@pytest.fixture
def gm():
    return capture(Net().eval(), (torch.randn(1, 1, 5, 5),))


def test_annotations_add_up(gm):
    conv = next(n for n in gm.graph.nodes if n.name == "conv2d")
    spec = QuantizationSpec(torch.int8, None)
    annotate_input_qspec_map(conv, conv.args[0], spec)
    annotate_input_qspec_map(conv, conv.args[1], None)
    annotate_output_qspec(conv, spec)
    note = conv.meta[ANNOTATION]
    assert note.input_qspec_map == {conv.args[0]: spec, conv.args[1]: None}
    assert note.output_qspec is spec


@pytest.mark.parametrize(
    ("module", "names"),
    [("block", ["conv2d", "relu"]), ("block.0", ["conv2d"]), ("head", ["conv2d_1"]), ("block.00", [])],
)
def test_module_name_filter(gm, module, names):
    inside = get_module_name_filter(module)
    assert [n.name for n in gm.graph.nodes if n.op == "call_function" and inside(n)] == names


def test_partitions_follow_each_other(gm):
    chains = find_sequential_partitions(gm, [nn.Conv2d, nn.ReLU])
    assert [tuple(p.output_nodes[0].name for p in chain) for chain in chains] == [("conv2d", "relu")]
    with pytest.raises(ValueError, match="must be a different op"):
        find_sequential_partitions(gm, [nn.ReLU, F.relu])


def test_equivalent_types_can_be_replaced(gm):
    before = [set(types) for types in get_equivalent_types()]
    try:
        update_equivalent_types_dict([{nn.ReLU, nn.ReLU6}])
        chains = find_sequential_partitions(gm, [nn.Conv2d, nn.ReLU])
        assert [chain[1].output_nodes[0].name for chain in chains] == ["relu", "hardtanh"]
        strict = find_sequential_partitions(gm, [nn.Conv2d, nn.ReLU], include_functional_equivalent=False)
        assert [chain[1].output_nodes[0].name for chain in strict] == ["relu"]
    finally:
        update_equivalent_types_dict(before)
    assert get_equivalent_types() == before
    with pytest.raises(ValueError, match="give the sets"):
        update_equivalent_types_dict(None)


def test_every_node_of_every_body_is_visited():
    class Branch(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    visited = []
    bfs_trace_with_node_process(
        torch.export.export(Branch(), (torch.ones(2),)), lambda n: visited.append(str(n.target))
    )
    assert {"aten.sin.default", "aten.cos.default", "cond"} <= set(visited)


def test_wrapper_and_exported(gm):
    wrapped = WrapperModule(torch.add)
    assert torch.equal(wrapped(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))
    assert model_is_exported(gm)
    assert not model_is_exported(wrapped)
    assert not model_is_exported(torch.fx.symbolic_trace(nn.ReLU()))
