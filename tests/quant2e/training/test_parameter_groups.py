"""Parameter groups: by pattern, each parameter once, frozen ones, and what raises."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from quant2e import parameter_groups, select_names
from quant2e.errors import Quant2eError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.features[2].weight


def names(model, group):
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    return [named[id(parameter)] for parameter in group["params"]]


def test_each_parameter_is_in_one_group():
    model = Net()
    groups = parameter_groups(
        model, {"head.*": {"lr": 0.5}, re.compile(r".*\.1\..*"): {"weight_decay": 0.0}, "features.0.weight": None}
    )
    assert [names(model, group) for group in groups] == [
        ["head.weight", "head.bias"],
        ["features.1.weight", "features.1.bias"],
        ["features.0.bias", "features.2.weight", "features.2.bias", "tied.bias"],
    ]
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == [
        {"lr": 0.5},
        {"weight_decay": 0.0},
        {},
    ]
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "features.0.weight"
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.01)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.5, 0.01),
        (0.1, 0.0),
        (0.1, 0.01),
    ]


def test_the_names_of_patterns():
    known = ["a.weight", "a.bias", "b[0].weight"]
    assert select_names(known, "*.weight") == ["a.weight", "b[0].weight"]
    assert select_names(known, "b[0].weight") == ["b[0].weight"]
    assert select_names(known, "re:a\\..*") == ["a.weight", "a.bias"]
    with pytest.raises(Quant2eError, match="'a.wieght' names no parameter; the nearest is 'a.weight'"):
        select_names(known, "a.wieght")
    with pytest.raises(Quant2eError, match="no regular expression"):
        select_names(known, "re:(")
    with pytest.raises(Quant2eError, match="none at all"):
        select_names([], "a")


def test_what_raises_freezes_nothing():
    model = Net()
    for settings, said in [
        ({"features.*": None, "hed.*": {"lr": 1.0}}, "'hed.\\*' names no parameter; the nearest is 'head"),
        ({"features.*": None, "*.bias": {"lr": 1.0}}, "by 'features.\\*' and by '\\*.bias'"),
        ({"*": None}, "nothing is left to train"),
        ({"head.*": {"params": []}, "features.*": None}, "hold 'params'"),
        ({"features.*": None, 3: {"lr": 1.0}}, "3 is no pattern"),
        ({"features.*": None, "head.*": 3}, "the options of 'head.\\*' are 3: give a mapping"),
        ({"features.*": None, "head.*": {"lr": math.nan}}, "hold lr=nan: 0 or larger"),
        ({"features.*": None, "head.*": {"weight_decay": -1e-4}}, "hold weight_decay=-0.0001: 0 or larger"),
        (["features.*"], "settings is a list: give a mapping"),
    ]:
        with pytest.raises(Quant2eError, match=said):
            parameter_groups(model, settings)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_parameter_goes_by_each_of_its_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    groups = parameter_groups(model, {"1.weight": {"lr": 0.5}, "1.bias": None})
    assert groups[0] == {"params": [model[0].weight], "lr": 0.5}
    assert len(parameter_groups(model, {"*.weight": {"lr": 0.5}})[0]["params"]) == 1
    with pytest.raises(Quant2eError, match="parameter '0.weight' is named by '1.weight' and by '0.\\*'"):
        parameter_groups(model, {"1.weight": {}, "0.*": {}})
