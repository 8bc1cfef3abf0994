"""Who is a quantizer, and what those may leave out that are only called."""

import pytest
import torch
from torch.fx import symbolic_trace

from quant2e import Quantizer
from quant2e.annotation.quantizer import annotated, transformed
from quantizers import XNNPACKQuantizer

GRAPH, OTHER = symbolic_trace(torch.nn.ReLU()), symbolic_trace(torch.nn.ReLU())


class Guest:
    """PT2E's methods, and no ancestor of ours."""

    def transform_for_annotation(self, model):
        return OTHER

    def annotate(self, model):
        return OTHER

    def validate(self, model):
        pass

    def prepare_obs_or_fq_callback(self, model, edge_or_node_to_obs_or_fq):
        pass


class Own(Quantizer):
    def annotate(self, model):
        return model

    def validate(self, model):
        pass


class InPlace:
    def annotate(self, model):
        pass


@pytest.mark.parametrize(
    ("candidate", "is_one"),
    [(Guest(), True), (Own(), True), (XNNPACKQuantizer(), True), (InPlace(), False), (3, False)],
)
def test_an_object_with_pt2es_methods_is_a_quantizer(candidate, is_one):
    assert isinstance(candidate, Quantizer) is is_one


def test_two_methods_are_asked_of_those_that_derive():
    with pytest.raises(TypeError, match="abstract methods? .*annotate"):
        type("Half", (Quantizer,), {"validate": lambda self, model: None})()
    own = Own()
    assert own.transform_for_annotation(GRAPH) is GRAPH
    assert own.prepare_obs_or_fq_callback(GRAPH, {}) is None


def test_what_returns_nothing_worked_in_place():
    assert annotated(Guest(), GRAPH) is transformed(Guest(), GRAPH) is OTHER
    assert annotated(InPlace(), GRAPH) is transformed(InPlace(), GRAPH) is GRAPH
