"""The quantizer interface: a protocol, and the base class of quantizers that declare it.

An object with these four methods is a `Quantizer`, whichever library it comes from; those of PT2E's own are.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol, runtime_checkable

from torch.fx import GraphModule

from quant2e.annotation.specs import EdgeOrNode


@runtime_checkable
class Quantizer(Protocol):
    """Says which tensors of a graph a backend computes on in integers, and with which numbers.

    `prepare_pt2e` calls the methods once each, in the order below, on a copy of the captured graph.
    """

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Rewrite the graph before annotation (decompose an op, say). The float result must stay the same."""
        return model

    @abstractmethod
    def annotate(self, model: GraphModule) -> GraphModule:
        """Put a `QuantizationAnnotation` under ``node.meta[ANNOTATION]`` of each node to quantize."""

    @abstractmethod
    def validate(self, model: GraphModule) -> None:
        """Raise when the annotated graph is not one the backend can run."""

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, Any]) -> None:
        """Look at, or replace in place, the observer of each annotated point before it enters the graph."""
        return  # optional: what a protocol leaves empty would have to be implemented


def transformed(quantizer: Quantizer, model: GraphModule) -> GraphModule:
    """The graph after ``transform_for_annotation`` of any quantizer:
    also of one without, or one that returns nothing.
    """
    transform = getattr(quantizer, "transform_for_annotation", None)
    made = transform(model) if callable(transform) else None
    return made if isinstance(made, GraphModule) else model


def annotated(quantizer: Quantizer, model: GraphModule) -> GraphModule:
    """The graph after ``annotate`` of any quantizer: also of one that annotates in place and returns nothing."""
    made: object = quantizer.annotate(model)
    return made if isinstance(made, GraphModule) else model
