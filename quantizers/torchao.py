"""Adapter to torchao: our quantizers inside its flow.

    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(torch.export.export(model, example_inputs).module(), as_torchao(quantizer))

Annotations are resolved by our plan and written down as torchao's: the first point of a group has the numbers, the
others share with it, always backwards, which is all that torchao follows. The observers are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from quant2e.annotation.granularity import PerTensor
from quant2e.annotation.interop import read_plan
from quant2e.annotation.plan import DerivedFrom, Edge, Output, Plan, Point
from quant2e.annotation.quantizer import Quantizer, annotated, transformed
from quant2e.annotation.specs import ANNOTATION, EdgeOrNode, dynamic_granularity_of
from quant2e.convert.insert_qdq import quantize_at, round_at
from quant2e.errors import Quant2eError
from quant2e.graph.constants import evaluate
from quant2e.observers.base import ObserverBase
from quant2e.observers.derived import DerivedObserver
from quant2e.observers.encodings import DynamicEncoding, PerGroupEncoding, RoundedConstant, encode
from quant2e.passes.fold_weights import attribute_path
from quant2e.prepare.insert_observers import find_scales_of_single_images, make_observers


def as_torchao(quantizer: Quantizer) -> TorchaoQuantizer:
    """``quantizer``, with annotations that torchao's ``prepare_pt2e`` and ``convert_pt2e`` understand.

    Raises `Quant2eError` where torchao is not installed. From the first call on torchao takes our observers for its own
    (they are registered as subclasses of its ``ObserverBase``).
    """
    try:
        from torchao.quantization.pt2e import observer
    except ImportError as error:
        raise Quant2eError("as_torchao needs torchao, which is not installed: pip install quant2e[torchao]") from error
    for ours in (ObserverBase, DerivedObserver, _GridObserver, _WritingObserver):
        observer.ObserverBase.register(ours)
    return TorchaoQuantizer(quantizer)


class TorchaoQuantizer:
    """What `as_torchao` returns: torchao's quantizer interface, over one of ours."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self._plan = Plan()

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """The quantizer's own transformation."""
        return transformed(self.quantizer, model)

    def annotate(self, model: GraphModule) -> GraphModule:
        """The quantizer's annotations, rewritten with torchao's classes."""
        model = annotated(self.quantizer, model)
        self._plan = read_plan(model)
        self._rewrite(model)
        return model

    def validate(self, model: GraphModule) -> None:
        """The quantizer's own check."""
        self.quantizer.validate(model)

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, Any]) -> None:
        """Our observers in place of torchao's; then the quantizer's own callback."""
        made = make_observers(self._plan)
        find_scales_of_single_images(model, self._plan, dict(enumerate(made)))
        observers = [_convertible(observer) for observer in made]
        for place in edge_or_node_to_obs_or_fq:
            group = self._plan.group_of(_point(place))
            assert group is not None, f"torchao observes {place}, which no annotation asks for"
            edge_or_node_to_obs_or_fq[place] = observers[group]
        if callable(callback := getattr(self.quantizer, "prepare_obs_or_fq_callback", None)):
            callback(model, edge_or_node_to_obs_or_fq)

    def _rewrite(self, model: GraphModule) -> None:
        from torchao.quantization.pt2e import quantizer as theirs

        first: dict[int, EdgeOrNode] = {}

        def spec(place: EdgeOrNode) -> Any:
            group = self._plan.group_of(_point(place))
            if group is None:
                return None
            if group in first:
                return theirs.SharedQuantizationSpec(first[group])
            first[group] = place
            return _numbers(self._plan.groups[group].spec, theirs)

        for node in model.graph.nodes:
            note = node.meta.get(ANNOTATION)
            if note is None:
                continue
            sources = [source for source in node.all_input_nodes if source in note.input_qspec_map]
            node.meta[ANNOTATION] = theirs.QuantizationAnnotation(
                {source: spec((source, node)) for source in sources},
                None if note.output_qspec is None else spec(node),
                # What may be shared is shared already, and nothing else may be.
                allow_implicit_sharing=False,
                _annotated=True,
            )


def _point(place: EdgeOrNode) -> Point:
    return Output(place.name) if isinstance(place, Node) else Edge(place[0].name, place[1].name)


def _numbers(spec: Any, theirs: Any) -> Any:
    """A plain spec of torchao for one of ours. Its observer is replaced before it sees anything."""
    from torchao.quantization.pt2e import observer

    # torchao looks for its own ops where a spec is dynamic, and finds none for tokens
    of_tensor = dynamic_granularity_of(spec) == PerTensor()
    dtype = torch.int32 if isinstance(spec, DerivedFrom) and spec.dtype.is_floating_point else spec.dtype
    return theirs.QuantizationSpec(
        dtype=dtype,
        observer_or_fake_quant_ctr=observer.PlaceholderObserver,
        quant_min=spec.quant_min,
        quant_max=spec.quant_max,
        qscheme=spec.qscheme,
        ch_axis=getattr(spec, "ch_axis", None),
        is_dynamic=of_tensor and bool(getattr(spec, "is_dynamic", False)),
    )


def _convertible(observer: nn.Module) -> nn.Module:
    """An observer that torchao's conversion can ask. What torchao has no nodes for writes its nodes itself."""
    if isinstance(observer, DerivedObserver) and observer.dtype.is_floating_point:
        return _GridObserver(observer)
    finer = getattr(observer, "group_size", None) or getattr(observer, "granularity", PerTensor()) != PerTensor()
    return _WritingObserver(observer) if finer else observer


class _GridObserver(nn.Module):
    """For a constant that stays float, rounded to a derived scale; torchao calls `convert` on it."""

    def __init__(self, derived: nn.Module) -> None:
        super().__init__()
        self.derived = [derived]  # a list: its sources are registered elsewhere
        self.dtype, self.is_dynamic = torch.float32, False

    def forward(self, x: Tensor) -> Tensor:
        """``x``."""
        return x

    def convert(self, model: GraphModule, node: Node) -> None:
        """Put the rounded constant in place of the observed one."""
        encoding, source = encode(self.derived[0]), node.all_input_nodes[0]
        assert isinstance(encoding, RoundedConstant), encoding
        round_at(model, node, evaluate(model, source), encoding, attribute_path(source))


class _WritingObserver(nn.Module):
    """For a weight with a scale for each group, or scales found for each token; torchao calls `convert` on it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.dtype, self.is_dynamic = inner.dtype, bool(getattr(inner, "is_dynamic", False))

    def forward(self, x: Tensor) -> Tensor:
        """``x``, which is observed."""
        seen: Tensor = self.inner(x)
        return seen

    def convert(self, model: GraphModule, node: Node) -> None:
        """Put our q/dq nodes in place of the observer's call."""
        encoding = encode(self.inner)
        assert isinstance(encoding, PerGroupEncoding | DynamicEncoding), encoding
        quantize_at(model, node, encoding, attribute_path(node.all_input_nodes[0]))
