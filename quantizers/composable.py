"""ComposableQuantizer: several quantizers, one after the other, on one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from quant2e.annotation.quantizer import Quantizer, annotated, transformed
from quant2e.annotation.specs import ANNOTATION, EdgeOrNode
from quant2e.errors import AnnotationError, where
from quantizers.capabilities import Capabilities, Declared, declared_by


class ComposableQuantizer(Quantizer):
    """Runs ``quantizers`` in order; what an earlier one annotated is not to be touched by a later one.

    Any object with PT2E's methods can be a child. All children's hooks run. A child that changes or removes another's
    annotation is an `AnnotationError` that names both and the node. ``None`` in a child's settings means that *this*
    child leaves a node float; a later one may still take it.
    """

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        super().__init__()
        self.quantizers = list(quantizers)
        self._idle: list[str] = []
        for child in self.quantizers:
            if not callable(getattr(child, "annotate", None)):
                raise AnnotationError(f"{child!r} is not a quantizer: it has no method annotate(model)")
        if not self.quantizers:
            raise AnnotationError("a ComposableQuantizer of no quantizers would leave everything float; give it some")

    @property
    def notes(self) -> list[str]:
        """The notes of all children, each once, and which of them annotated nothing."""
        told = (str(note) for child in self.quantizers for note in getattr(child, "notes", ()) or ())
        return [*dict.fromkeys((*told, *self._idle))]

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """All children's transformations, in order."""
        for child in self.quantizers:
            model = transformed(child, model)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """All children's annotations, in order. Raises `AnnotationError` when one touches what another annotated."""
        owners: dict[str, _Owned] = {}
        self._idle = []
        for index, child in enumerate(self.quantizers):
            model = annotated(child, model)
            named = {node.name: node for node in model.graph.nodes}
            for name, owned in owners.items():
                self._check_untouched(owned, named.get(name), index)
            made = {name: node for name, node in named.items() if name not in owners and _annotation(node) is not None}
            owners |= {name: _Owned(index, node, _content(_annotation(node))) for name, node in made.items()}
            if not made:
                self._idle.append(f"{self._name(index)} annotated nothing")
        return model

    def _check_untouched(self, owned: _Owned, node: Node | None, index: int) -> None:
        if node is not None and _content(_annotation(node)) == owned.content:
            return
        did = "removed" if node is None or _annotation(node) is None else "changed"
        what = "removed the node, and with it the annotation" if node is None else f"{did} the annotation"
        raise AnnotationError(
            f"{self._name(index)} {what} that {self._name(owned.child)} made on {where(owned.node)}; let it skip nodes "
            "that have one, or put it first"
        )

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
            f"{self._name(index)}: {explain(node)}"
            for index, child in enumerate(self.quantizers)
            if callable(explain := getattr(child, "explain", None))
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

    def quantization_capabilities(self) -> Capabilities:
        """The union of what the children can quantize, in order of precedence, as data that prints as a table.

        The children of a composition inside this one stand where it stands.
        """
        declared: dict[str, Declared] = {}
        silent: list[str] = []
        for index, child in enumerate(self.quantizers):
            name, answer = self._name(index), declared_by(child)
            if answer is None:
                silent.append(name)
            elif isinstance(answer, Capabilities):
                declared |= {f"{name} > {inner}": rules for inner, rules in answer.items()}
                silent += [f"{name} > {inner}" for inner in answer.silent]
            else:
                declared[name] = answer
        return Capabilities(declared, tuple(silent))

    def _name(self, index: int) -> str:
        name = type(self.quantizers[index]).__name__
        several = sum(type(q).__name__ == name for q in self.quantizers) > 1
        return f"{name} ({index + 1} of {len(self.quantizers)})" if several else name


@dataclass(frozen=True, slots=True)
class _Owned:
    """An annotation as a child left it."""

    child: int
    node: Node
    content: tuple[Any, ...] | None


def _annotation(node: Node) -> Any:
    return node.meta.get(ANNOTATION)


def _content(annotation: Any) -> tuple[Any, ...] | None:
    """What an annotation says, for noticing changes in place, and in a copy of the graph."""
    if annotation is None:
        return None
    inputs = getattr(annotation, "input_qspec_map", None) or {}
    said = tuple((getattr(key, "name", key), _said(spec)) for key, spec in inputs.items())
    return (
        said,
        _said(getattr(annotation, "output_qspec", None)),
        bool(getattr(annotation, "allow_implicit_sharing", True)),
    )


def _said(spec: Any) -> Any:
    """A spec, with the nodes that it refers to by name."""
    if (place := getattr(spec, "edge_or_node", None)) is not None:
        return ("shared", *(node.name for node in (place if isinstance(place, tuple) else (place,))))
    return spec
