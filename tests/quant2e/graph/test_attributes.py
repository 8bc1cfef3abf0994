"""Attributes by path: read, free names, registered tensors."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from quant2e.errors import PassError
from quant2e.graph.attributes import attribute, free_path, register_tensor, replace_tensor, tensor_at


def _module():
    module = nn.Module()
    module.layer = nn.Linear(2, 2, bias=False)  # its bias is a parameter that is None
    module.register_buffer("empty", None)
    module.plain = None
    return module


def test_attribute():
    module = _module()
    assert attribute(module, "layer.weight") is module.layer.weight
    assert attribute(module, "layer.bias") is None
    assert attribute(module, "layer.gain", None) is None
    assert attribute(module, "layer.gain.x", 3) == 3
    with pytest.raises(PassError, match="attribute 'layer.gain.x'"):
        attribute(module, "layer.gain.x")


def test_tensor_at():
    module, graph = _module(), Graph()
    weight, layer, x = graph.get_attr("layer.weight"), graph.get_attr("layer"), graph.placeholder("x")
    gm = GraphModule({"layer.weight": module.layer.weight, "layer": module.layer}, graph)
    assert tensor_at(gm, weight) is gm.layer.weight
    assert [tensor_at(gm, other) for other in (layer, x, 1.0, None)] == [None] * 4
    del gm.layer
    assert tensor_at(gm, weight) is None


@pytest.mark.parametrize(
    ("path", "free"),
    [
        ("scale", "scale"),
        ("layer", "layer_1"),
        ("layer.weight", "layer.weight_1"),
        ("layer.bias", "layer.bias"),  # a parameter that is None
        ("empty", "empty"),  # a buffer that is None
        ("plain", "plain_1"),  # somebody's attribute
        ("training", "training_1"),
        ("new.module.weight", "new.module.weight"),
        ("new.training", "new.training_1"),
    ],
)
def test_free_path_and_register(path, free):
    module, value = _module(), torch.ones(3)
    assert free_path(module, path) == free
    assert register_tensor(module, path, value) == free
    assert attribute(module, free) is value
    assert free in dict(module.named_buffers())


def test_numbers_go_on():
    module = _module()
    names = [register_tensor(module, "scale", torch.zeros(1)) for _ in range(3)]
    assert names == ["scale", "scale_1", "scale_2"]


@pytest.mark.parametrize("path", ["layer.weight", "layer.bias", "empty", "constant"])
def test_replace_tensor(path):
    module, parameter = _module(), nn.Parameter(torch.zeros(2))
    module.constant = torch.ones(2)
    replace_tensor(module, path, parameter)
    assert attribute(module, path) is parameter
    assert path in dict(module.named_parameters())
