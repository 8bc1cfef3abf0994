"""Comparisons of graphs with control flow: bodies count as a whole, and their observers learn nothing."""

import torch

import quant2e
from tests.control_flow_models import Branches, captured, data, prepared


def test_comparing_teaches_observers_inside_nothing():
    graph = prepared(Branches)
    before = quant2e.Statistics.of(graph)
    converted = quant2e.convert_pt2e(graph)
    found = quant2e.compare(captured(Branches), converted, data(Branches, 3))
    assert found.of("linear").local_sqnr_db > 20
    assert {row.op for row in found.rows} == {"linear", "sum_1", "getitem", "mul"}  # the results of the branches
    quant2e.sensitivity(graph, data=data(Branches, 2))
    after = quant2e.Statistics.of(graph)
    for name, state in before.states.items():
        assert all(torch.equal(value, after.states[name][part]) for part, value in state.items())
