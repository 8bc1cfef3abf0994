"""Several quantizers, one after the other, on one graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from quant2e.errors import AnnotationError, where
from quant2e.quantizer import Quantizer
from quant2e.specs import ANNOTATION, EdgeOrNode


class ComposableQuantizer(Quantizer):
    """Runs ``quantizers`` in order; what an earlier one annotated is not to be touched by a later one.

    Any object with PT2E's methods can be a child. All children's hooks run. A child that changes or removes another's
    annotation is an `AnnotationError` that names both and the node. ``None`` in a child's settings means that *this*
    child leaves a node float; a later one may still take it.
    """

    def __init__(self, quantizers: Sequence[Any]) -> None:
        super().__init__()
        self.quantizers = list(quantizers)
        for child in self.quantizers:
            if not callable(getattr(child, "annotate", None)):
                raise AnnotationError(f"{child!r} is not a quantizer: it has no method annotate(model)")
        if not self.quantizers:
            raise AnnotationError("a ComposableQuantizer of no quantizers would leave everything float; give it some")

    @property
    def notes(self) -> list[str]:
        """The notes of all children, each once."""
        return [*dict.fromkeys(str(note) for child in self.quantizers for note in getattr(child, "notes", ()) or ())]

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """All children's transformations, in order."""
        for child in self.quantizers:
            transform = getattr(child, "transform_for_annotation", None)
            model = (transform(model) if callable(transform) else None) or model
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """All children's annotations, in order."""
        owners: dict[Node, tuple[Any, Any, str]] = {}
        for index, child in enumerate(self.quantizers):
            model = child.annotate(model) or model
            for node, (owner, annotation, content) in owners.items():
                found = node.meta.get(ANNOTATION)
                if found is not annotation or _content(found) != content:
                    raise AnnotationError(
                        f"{self._name(index)} {'removed' if found is None else 'changed'} the annotation that "
                        f"{self._name(owner)} made on {where(node)}; let it skip nodes that have one, or put it first"
                    )
            for node in model.graph.nodes:
                annotation = node.meta.get(ANNOTATION)
                if annotation is not None and node not in owners:
                    owners[node] = (index, annotation, _content(annotation))
        return model

    def validate(self, model: GraphModule) -> None:
        """All children's checks."""
        for child in self.quantizers:
            if callable(validate := getattr(child, "validate", None)):
                validate(model)

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, Any]) -> None:
        """All children's callbacks, in order, on the same map."""
        for child in self.quantizers:
            if callable(callback := getattr(child, "prepare_obs_or_fq_callback", None)):
                callback(model, edge_or_node_to_obs_or_fq)

    def explain(self, node: Node) -> str:
        """What each child has to say about a node, in order."""
        told = [
            f"{self._name(index)}: {child.explain(node)}"
            for index, child in enumerate(self.quantizers)
            if callable(getattr(child, "explain", None))
        ]
        return "\n".join(told) or "none of the quantizers explains itself"

    def reason(self, node: Node) -> str:
        """Each child's reason for leaving a node float, in one line; what they agree on is said once."""
        reasons: dict[str, list[str]] = {}
        for index, child in enumerate(self.quantizers):
            tell = getattr(child, "reason", None) or getattr(child, "explain", None)
            if callable(tell) and (reason := str(tell(node)).partition("\n")[0]):
                reasons.setdefault(reason, []).append(self._name(index))
        uncovered = ("no rule covers", "no dynamic rule covers")
        specific = {reason: who for reason, who in reasons.items() if not reason.startswith(uncovered)}
        if len(specific) <= 1:
            return next(iter(specific or list(reasons)[-1:]), "")
        return "; ".join(f"{' and '.join(who)}: {reason}" for reason, who in specific.items())

    def quantization_capabilities(self) -> Mapping[str, Mapping[str, Sequence[str]]]:
        """Child → its capabilities, in order of precedence; children that do not tell are left out."""
        told = {self._name(i): getattr(q, "quantization_capabilities", None) for i, q in enumerate(self.quantizers)}
        return {name: ask() for name, ask in told.items() if callable(ask)}

    def _name(self, index: int) -> str:
        name = type(self.quantizers[index]).__name__
        several = sum(type(q).__name__ == name for q in self.quantizers) > 1
        return f"{name} ({index + 1} of {len(self.quantizers)})" if several else name


def _content(annotation: Any) -> str:
    """What an annotation says, for noticing changes in place."""
    inputs = getattr(annotation, "input_qspec_map", None) or {}
    said = [(getattr(key, "name", key), id(spec)) for key, spec in inputs.items()]
    return repr((said, id(getattr(annotation, "output_qspec", None))))
