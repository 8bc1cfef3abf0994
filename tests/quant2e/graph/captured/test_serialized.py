"""Graphs as plain data."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.serialized import graph_from_state, graph_state, plain, plain_entries


class Slices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x[:, 1:], x[:, :1]], 1).to(torch.float64)
        return torch.cond(x.shape[0] > 1, lambda y: y + 1, lambda y: y - 1, (y,)) + torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_graph_comes_back_node_by_node(dynamic):
    shapes = ({0: Dim("n")},) if dynamic else None
    graph = capture(Slices(), torch.ones(2, 3), dynamic_shapes=shapes).graph
    back = graph_from_state(pickle.loads(pickle.dumps(graph_state(graph))))
    assert str(back) == str(graph)
    for old, new in zip(graph.nodes, back.nodes, strict=True):
        assert new.meta.get("stack_trace") == old.meta.get("stack_trace")
        assert new.meta.get("nn_module_stack") == old.meta.get("nn_module_stack")
        value = old.meta.get("val")
        if isinstance(value, Tensor):
            fixed = all(type(size) is int for size in value.shape)
            assert ("val" in new.meta) is fixed
            if fixed:
                kept = new.meta["val"]
                assert (kept.shape, kept.stride(), kept.dtype) == (value.shape, value.stride(), value.dtype)


def test_plain_data_and_the_rest():
    assert plain({"a": (1, [2.5, None]), torch.int8: nn.Linear}) == {
        "a": (1, [2.5, None]),
        torch.int8: "torch.nn.modules.linear.Linear",
    }
    assert plain_entries({"kept": [1], "lost": [object()], "tensor": torch.ones(1)}) == {"kept": [1]}


def test_what_cannot_be_pickled_in_the_modules_metadata_is_left_out():
    captured = capture(nn.Linear(3, 3), torch.ones(1, 3))
    captured.meta |= {"kept": {1: "a"}, "lost": lambda: None}
    back = pickle.loads(pickle.dumps(captured))
    assert back.meta["kept"] == {1: "a"}
    assert "lost" not in back.meta
