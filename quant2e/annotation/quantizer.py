"""The base class of backend quantizers. Any object with these methods works as well."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch.fx import GraphModule

from quant2e.annotation.specs import EdgeOrNode


class Quantizer(ABC):
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
