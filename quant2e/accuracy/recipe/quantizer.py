"""RecipeQuantizer: any quantizer, ours or a guest's, whose annotations are rewritten as a recipe asks.

A quantizer that takes schemes by a predicate on nodes (``set_node``) is told them, so that its own rules say what
they are for; of every other, and for numbers alone, the specs of its annotations are changed. What the backend refuses
stays as it has it, and is told.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from quant2e.accuracy.recipe.matching import calls, fits_point, op_path, unmatched, wanted_of
from quant2e.accuracy.recipe.rewriting import in_mode, is_plain, rewritten, with_given
from quant2e.accuracy.recipe.settings import OperandSettings, OpSettings, RecipeRule, TensorRule, Wanted
from quant2e.accuracy.recipe.spec_places import (
    SpecPlace,
    drop_dangling,
    head_of,
    is_empty,
    is_fused,
    is_weighted,
    root_of,
    spec_places,
)
from quant2e.annotation.plan import same_numbers
from quant2e.annotation.quantizer import Quantizer, annotated, transformed
from quant2e.annotation.specs import ANNOTATION, EdgeOrNode, group_size_of
from quant2e.errors import AnnotationError, Quant2eError
from quant2e.graph.constants import Constants
from quant2e.graph.control_flow import BODY
from quant2e.graph.fake_values import is_float
from quant2e.report.macs import count_macs

_NAMED = 4
_PREDICATE = "the recipe asks"
"""In the names of settings that are made here: what is not honoured of them is told here."""


class RecipeQuantizer:
    """What `Recipe.apply` returns. ``unmet``: what the backend cannot honour, once a graph was annotated."""

    def __init__(
        self,
        quantizer: Quantizer,
        default: OpSettings | None,
        rules: Sequence[RecipeRule],
        tensors: Sequence[TensorRule],
    ) -> None:
        self._default, self._rules, self._tensors = default, tuple(rules), tuple(tensors)
        self._told: dict[str, list[str]] = {}
        self.children: list[_Child] = []
        self.changed: set[str] = set()
        self.quantizer = self._wrapped(quantizer)

    def _wrapped(self, quantizer: Any) -> Any:
        """The quantizer, or a composition with each of its children, behind this recipe."""
        children = getattr(quantizer, "quantizers", None)
        if isinstance(children, list) and children:
            made = copy.copy(quantizer)
            made.quantizers = [self._wrapped(child) for child in children]
            return made
        own = copy.copy(quantizer) if callable(getattr(quantizer, "set_node", None)) else quantizer
        child: _Child = type(type(quantizer).__name__, (_Child,), {})(own, self)  # messages name what is wrapped
        self.children.append(child)
        return child

    # ------------------------------------------------------------------------------------------ what is said

    @property
    def unmet(self) -> tuple[str, ...]:
        """What could not be honoured: the rule, the ops, the reason."""
        return tuple(f"{said}: {_listed(ops)}" for said, ops in self._told.items())

    @property
    def notes(self) -> list[str]:
        """Those of the quantizer, and what of the recipe could not be honoured."""
        own = [str(note) for note in getattr(self.quantizer, "notes", ()) or () if _PREDICATE not in str(note)]
        return [*own, *(f"recipe: {line}" for line in self.unmet)]

    def reason(self, node: Node) -> str:
        """Why an op stays float: the recipe's words, or the quantizer's."""
        if (wanted := self.wanted(head_of(node), node)).is_float:
            return f"{self.by(wanted)} leaves it float"
        own = getattr(self.quantizer, "reason", None) or getattr(self.quantizer, "explain", None)
        said = str(own(node)).partition("\n")[0] if callable(own) else ""
        return said or f"{_name(self.quantizer)} did not annotate {node.target}"

    def tell(self, said: str, node: Node) -> None:
        """Something that could not be honoured for an op."""
        ops = self._told.setdefault(said, [])
        if op_path(node) not in ops:
            ops.append(op_path(node))

    def by(self, wanted: Wanted) -> str:
        """The last rule that decided, in words."""
        index = wanted.by[-1] if wanted.by else -1
        return "the recipe's default" if index < 0 else f"rules[{index}] of the recipe, {self._rules[index]},"

    def wanted(self, node: Node, own: Node | None = None) -> Wanted:
        """What the recipe wants of an op; see `wanted_of`."""
        return wanted_of(node, self._default, self._rules, own)

    # ------------------------------------------------------------------------------------------ PT2E's methods

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """The quantizer's own. Raises `AnnotationError` for rules that name nothing in the model."""
        if BODY not in model.meta and (lines := unmatched(model, self._rules, self._tensors)):
            raise AnnotationError("; ".join(lines))
        return transformed(self.quantizer, model)

    def annotate(self, model: GraphModule) -> GraphModule:
        """The quantizer's annotations, with the recipe's numbers."""
        model = annotated(self.quantizer, model)
        self.changed |= drop_dangling(model)
        self._fix_tensors(model)
        self.changed |= drop_dangling(model)
        for node in calls(model):
            note = node.meta.get(ANNOTATION)
            if note is not None and is_empty(note) and op_path(node) in self.changed:
                del node.meta[ANNOTATION]
        self._check_reached(model)
        return model

    def validate(self, model: GraphModule) -> None:
        """The quantizer's own check."""
        self.quantizer.validate(model)

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, Any]) -> None:
        """The quantizer's own callback."""
        if callable(callback := getattr(self.quantizer, "prepare_obs_or_fq_callback", None)):
            callback(model, edge_or_node_to_obs_or_fq)

    def _check_reached(self, model: GraphModule) -> None:
        """Tell of ops that a rule wants quantized and that nobody annotated: those that it names by themselves, those
        that do the work, and all of a rule that reached none.
        """
        idle: dict[int, list[Node]] = {}
        reached: set[int] = set()
        for node in calls(model):
            wanted = self.wanted(node)
            if wanted.is_float or not wanted.by or not is_float(node):
                continue
            refused = next((words for child in self.children if (words := child.refused.get(wanted))), "")
            if ANNOTATION in node.meta or is_fused(node):
                reached.add(wanted.by[-1])
            elif refused:
                self.tell(f"{self.by(wanted)} {refused}", node)
            elif wanted.by[-1] >= 0:
                idle.setdefault(wanted.by[-1], []).append(node)
        for index, ops in idle.items():
            by_itself = {"name", "op"} & self._rules[index].names.keys()
            for node in ops:
                if by_itself or index not in reached or count_macs(node):
                    self.tell(
                        f"{self.by(self.wanted(node))} names what {_name(self.quantizer)} does not quantize", node
                    )

    def _fix_tensors(self, model: GraphModule) -> None:
        path = model.meta.get(BODY, "")
        prefix = f"{path}." if path else ""
        for index, asked in enumerate(self._tensors):
            hit = False
            for place in list(spec_places(model)):
                if fits_point(asked.tensor, prefix + place.name):
                    hit = True
                    self._fix(index, asked, place, model)
            if not hit:
                for node in (n for n in model.graph.nodes if fits_point(asked.tensor, prefix + n.name)):
                    self.tell(f"tensors[{index}] of the recipe: {_name(self.quantizer)} does not quantize", node)

    def _fix(self, index: int, asked: TensorRule, place: SpecPlace, model: GraphModule) -> None:
        """Give one point, and what shares its tensor's numbers, those of a tensor rule."""
        place = root_of(place)
        old = place.spec
        try:
            new = None if asked.use == "float" else with_given(old, asked)
        except Quant2eError as error:
            self.tell(f"tensors[{index}] of the recipe: {error}", place.node)
            return
        if new is not None and (why := next((w for c in self.children if (w := c.objection(place, new))), "")):
            self.tell(f"tensors[{index}] of the recipe: {why}", place.node)
            return
        alike = [p for p in spec_places(model) if p.tensor is place.tensor and same_numbers(p.spec, old)]
        for other in (place, *(alike if " -> " not in asked.tensor else ())):
            other.put(new)
            self.changed.add(op_path(other.node))


class _Child:
    """One quantizer without children, whose annotations are rewritten."""

    def __init__(self, quantizer: Any, recipe: RecipeQuantizer) -> None:
        self._quantizer, self._recipe = quantizer, recipe
        self.refused: dict[Wanted, str] = {}
        self._schemes: list[Wanted] = []
        self._own: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._quantizer, name)

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        self._tell_schemes(model)
        return transformed(self._quantizer, model)

    def annotate(self, model: GraphModule) -> GraphModule:
        before = {node.name for node in model.graph.nodes if ANNOTATION in node.meta}
        model = annotated(self._quantizer, model)
        new = [n for n in model.graph.nodes if ANNOTATION in n.meta and n.name not in before]
        constants = Constants(model.graph)
        self._own = {op_path(node) for node in new}
        for node in new:
            self._rewrite(node, constants)
        return model

    def objection(self, place: SpecPlace, spec: Any) -> str:
        """Why the backend cannot have a spec at a place that it annotated; empty where it can."""
        if op_path(place.node) not in self._own:
            return ""
        constants = Constants(place.node.graph)
        inputs, output = ({}, spec) if place.source is None else ({place.source: spec}, None)
        try:
            self._check(place.node, inputs, output, constants)
        except Quant2eError as error:
            return str(error)
        return ""

    def validate(self, model: GraphModule) -> None:
        if callable(validate := getattr(self._quantizer, "validate", None)):
            validate(model)

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, Any]) -> None:
        if callable(callback := getattr(self._quantizer, "prepare_obs_or_fq_callback", None)):
            callback(model, edge_or_node_to_obs_or_fq)

    # ------------------------------------------------------------------------------------------ by schemes

    def _tell_schemes(self, model: GraphModule) -> None:
        """Settings of the quantizer for what rules ask as a whole; by predicates, so that the last rule wins."""
        if not callable(getattr(self._quantizer, "set_node", None)) or not hasattr(self._quantizer, "base_config"):
            return
        for wanted in dict.fromkeys(self._recipe.wanted(node) for node in calls(model)):
            if wanted in self._schemes or not (wanted.is_float or wanted.scheme):
                continue
            self._schemes.append(wanted)
            try:
                scheme = None if wanted.is_float else self._fitting(wanted.scheme)
                self._quantizer.set_node(_Is(self._recipe, wanted), scheme)
            except Quant2eError as error:
                self.refused[wanted] = str(error)

    def _fitting(self, scheme: Any) -> Any:
        """The scheme without activations, for a quantizer that has none."""
        base = self._quantizer.base_config(is_dynamic=False, is_qat=False)
        if base.input_activation is None:
            return replace(scheme, activation=None, is_dynamic=False)
        return scheme

    # ------------------------------------------------------------------------------------------ by specs

    def _rewrite(self, node: Node, constants: Constants) -> None:
        wanted = self._recipe.wanted(head_of(node), node)
        note = node.meta[ANNOTATION]
        if wanted.is_float:
            note = node.meta[ANNOTATION] = copy.copy(note)
            note.input_qspec_map = dict.fromkeys(note.input_qspec_map)
            note.output_qspec = None
            self._recipe.changed.add(op_path(node))
            return
        if not wanted.by or wanted in self._schemes:
            if wanted in self.refused:
                self._recipe.tell(f"{self._recipe.by(wanted)} {self.refused[wanted]}", node)
            return
        try:
            inputs, output = self._numbers(node, wanted, constants)
            self._check(node, inputs, output, constants)
        except Quant2eError as error:
            self._recipe.tell(f"{self._recipe.by(wanted)} {error}; {_name(self)}'s own numbers stay", node)
            return
        note = node.meta[ANNOTATION] = copy.copy(note)
        note.input_qspec_map, note.output_qspec = inputs, output
        self._recipe.changed.add(op_path(node))

    def _numbers(self, node: Node, wanted: Wanted, constants: Constants) -> tuple[dict[Node, Any], Any]:
        note = node.meta[ANNOTATION]
        weighted = is_weighted(head_of(node), constants)
        inputs = {
            source: self._operand(spec, wanted, source in constants, weighted)
            for source, spec in note.input_qspec_map.items()
        }
        output = note.output_qspec
        if is_plain(output):
            at_run_time = wanted.mode is not None and wanted.mode != "static"
            output = None if at_run_time else self._operand(output, wanted, False, weighted)
        elif output is not None and wanted.mode in ("dynamic", "weight-only"):
            output = None
        return inputs, output

    def _operand(self, spec: Any, wanted: Wanted, constant: bool, weighted: bool) -> Any:
        if not is_plain(spec):
            shared = hasattr(spec, "edge_or_node") and wanted.mode in ("dynamic", "weight-only")
            return None if shared else spec
        asked = wanted.weight if constant else wanted.activation
        if asked == "float" or (not constant and wanted.mode == "weight-only"):
            return None
        if not constant:
            if wanted.mode == "dynamic" and not weighted:
                return None
            spec = in_mode(spec, wanted.mode, self._of_backend(wanted))
        return spec if not isinstance(asked, OperandSettings) else rewritten(spec, asked, activation=not constant)

    def _of_backend(self, wanted: Wanted) -> Any:
        if not callable(ask := getattr(self._quantizer, "base_config", None)):
            return None
        return ask(is_dynamic=wanted.mode == "dynamic", is_qat=False).input_activation

    def _check(self, node: Node, inputs: dict[Node, Any], output: Any, constants: Constants) -> None:
        """Raise what the backend says of specs that it does not take."""
        accept, choose = (getattr(self._quantizer, name, None) for name in ("accept", "choose"))
        config = choose(head_of(node)).config if callable(accept) and callable(choose) else None
        if not callable(accept) or config is None:
            return
        changes: dict[str, Any] = {}
        for source, spec in inputs.items():
            if is_plain(spec):
                changes["weight" if source in constants else "input_activation"] = spec
        if is_plain(output):
            changes["output_activation"] = output
            changes.setdefault("input_activation", output)  # of an op that is fused: backends look at inputs
        if not getattr(self._quantizer, "takes_groups", True) and group_size_of(changes.get("weight")):
            raise AnnotationError("the kernels of this backend know one scale per output channel at most")
        accept(replace(config, **{name: spec for name, spec in changes.items() if getattr(config, name) is not None}))


@dataclass(frozen=True, slots=True)
class _Is:
    """The predicate of one wish: whether a node is one of those that rules want it of."""

    recipe: RecipeQuantizer
    wish: Wanted

    @property
    def __name__(self) -> str:
        return f"of what {_PREDICATE}"

    def __call__(self, node: Node) -> bool:
        return self.recipe.wanted(node) == self.wish

    def __deepcopy__(self, memo: Any) -> _Is:
        return self


def _name(quantizer: Any) -> str:
    return type(quantizer).__name__


def _listed(ops: Sequence[str]) -> str:
    more = f" and {len(ops) - _NAMED} more" if len(ops) > _NAMED else ""
    return ", ".join(f"'{op}'" for op in ops[:_NAMED]) + more
