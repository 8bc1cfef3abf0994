"""Constants without dimensions that control flow takes: afterwards they depend on an input."""

import torch

from lowering.inductor.rewrites.constant_operands import constants_as_operands
from quant2e.graph.constants import Constants
from quant2e.graph.control_flow import control_flow, operands_of_bodies
from quant2e.passes import run
from tests.control_flow_models import Loop, Mapped, captured, data


def test_a_counter_that_begins_at_zero_becomes_a_value():
    gm, (x,) = captured(Loop), data(Loop, 1)[0]
    wanted = gm(x)
    assert run(gm, (constants_as_operands,)) == {"constants_as_operands": 1}
    (node,) = (node for node in gm.graph.nodes if control_flow(node) is not None)
    assert operands_of_bodies(node)[0] not in Constants(gm.graph)
    assert torch.equal(gm(x), wanted)
    assert not run(gm, (constants_as_operands,))


def test_others_are_left_alone():
    assert not run(captured(Mapped), (constants_as_operands,))
