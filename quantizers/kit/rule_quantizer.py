"""Rule-based quantizer: a table of rules over patterns.

    class NpuQuantizer(RuleQuantizer):
        rules = (Rule(clamp(mac) | mac, {"x": ACT, "w": WEIGHT}, ACT), Rule(moves(x), {"x": Follow(ACT)}, Same("x")))

First, against the flow of data, the rules that bring their own numbers: of all matches that end in a node the largest
wins, then the first in the table. Then, with the flow, the rules that `Follow`. What is left float gets a reason.

Before training, batch norms are still in the graph. Patterns look through those that conversion will fold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.annotation.pattern import Folded, Match, explain, roots, short_name, solutions
from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation
from quant2e.graph.constants import Constants
from quant2e.graph.fake_values import is_float, node_tensor
from quant2e.graph.mutation import ObservableWrite, observable_writes
from quant2e.graph.qdq_ops import DEQUANTIZE
from quant2e.passes.train_batch_norm import trainable_norms
from quantizers.kit.conditions import reads_integers
from quantizers.kit.explanation import APPLIED, MATCHED, NEARLY, Trial, Trials
from quantizers.kit.rule import ChosenConfig, Follow, Rule, parts
from quantizers.kit.value_source import Source, ValueSources

_ACTIVE = object()


class RuleQuantizer(Quantizer):
    """Annotates what its ``rules`` match. Subclass it and set ``rules``, or override `table`.

    Never annotated: integer and boolean tensors, numbers, shape arithmetic, masks and what holds masking values, dtypes
    outside ``dtypes``, and nodes that another quantizer has annotated before.
    """

    rules: Sequence[Rule] = ()
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.float16, torch.bfloat16})
    """Tensors of other dtypes stay as they are."""
    float_ops: ClassVar[Mapping[str, str]] = {}
    """Op name → why the backend computes it in float; for reports."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        """What the user should know about the choices made, for the report."""
        self._why: dict[str, str] = {}
        self._folded: Folded = {}
        self.trials = Trials()
        """What the last run tried, rule by rule and node by node; `explain` reads it."""

    # ------------------------------------------------------------ what subclasses may say

    def choose(self, node: Node) -> ChosenConfig:
        """Which configuration a node has. `table` turns it into rules; a config of None leaves the node float."""
        return ChosenConfig(_ACTIVE, "every node")

    def configs(self) -> Sequence[Any]:
        """The configurations that `choose` may answer with."""
        return (_ACTIVE,)

    def table(self, config: Any) -> Sequence[Rule]:
        """The rules for nodes of one configuration."""
        return self.rules

    def uncovered(self, node: Node, config: Any) -> str:
        """Why an op that no rule is rooted at stays float; empty if a rule that did not match says it better."""
        known = self.float_ops.get(short_name(node.target).removesuffix("_"), "")
        rooted = any(node.target in roots(rule.pattern) for rule in self.table(config))
        return known or ("" if rooted else f"no rule covers {node.target}")

    def folded_into(self, node: Node) -> Node:
        """The op that a batch norm of the graph will be folded into; of any other node, the node itself."""
        return self._folded.get(node, node)

    def objection_to_node(self, node: Node) -> str | None:
        """Why an op must stay float whatever rule matches it, if it must."""
        return None

    def objection_to_edge(self, producer: Node, consumer: Node) -> str | None:
        """Why the use of one node's tensor by another must stay float, if it must."""
        return None

    def refine(
        self, rule: Rule, match: Match, made: dict[Node, QuantizationAnnotation]
    ) -> dict[Node, QuantizationAnnotation]:
        """The annotations that a rule made for a match, possibly with other specs."""
        return made

    # ------------------------------------------------------------ the quantizer's interface

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate all matches."""
        pairs = [(pair.result, pair.mac) for pair in trainable_norms(model)]
        self._folded = {norm: op for norm, op in pairs if ANNOTATION not in op.meta and ANNOTATION not in norm.meta}
        run = _Pass(self, model, self._folded)
        self._why, self.trials = run.run(), run.trials
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: what a table annotates is what it accepts."""

    def reason(self, node: Node) -> str:
        """Why a node is float, or which rule quantizes it, in one line. Call it after `annotate`."""
        note = node.meta.get(ANNOTATION)
        if note is not None:
            return f"quantized by {getattr(note, 'rule', '') or 'another quantizer'}"
        return self._why.get(node.name, "not a float op")

    def explain(self, node: Node) -> str:
        """The `reason`, and a line for every rule that was tried at the node: which applied, which matched and lost to
        what, which nearly matched and why not. Call it after `annotate`, with a node of that graph or of what it
        became.
        """
        rules = [rule for config in self.configs() for rule in self.table(config)]
        return self.trials.text(node, self.reason(node), rules)

    @classmethod
    def quantization_capabilities(cls) -> Mapping[str, Sequence[str]]:
        """The rules by name, with the patterns they quantize."""
        return {rule.name: tuple(map(str, getattr(rule.pattern, "choices", (rule.pattern,)))) for rule in cls.rules}


@dataclass(slots=True)
class _Pass:
    """One run of a quantizer over one graph."""

    quantizer: RuleQuantizer
    gm: GraphModule
    folded: Folded
    constants: Constants = field(init=False)
    value_sources: ValueSources = field(init=False)
    choices: dict[Node, ChosenConfig] = field(init=False)
    computed: set[Node] = field(default_factory=set)
    trials: Trials = field(default_factory=Trials)
    written: dict[Node, ObservableWrite] = field(init=False)
    following: frozenset[Any] = frozenset()

    def __post_init__(self) -> None:
        self.constants = Constants(self.gm.graph)
        self.value_sources = ValueSources(self.gm)
        self.written = observable_writes(self.gm.graph)
        calls = [node for node in self.gm.graph.nodes if node.op == "call_function"]
        self.choices = {node: self.quantizer.choose(node) for node in calls}

    def run(self) -> dict[str, str]:
        """Annotate; answer why the other float ops are not."""
        own, following = self._index()
        self.following = frozenset(following)
        calls, into = list(self.choices), set(self.folded.values())
        results = [node for node in calls if node not in into]
        for node in reversed(results):
            found = list(self._matches(own, node))
            self._apply(max(found, key=lambda pair: len(pair[1].nodes), default=None), found)
        for node in results:
            found = list(self._matches(following, node))
            self._apply(next(iter(found), None), found)
        return {node.name: self._reason(node) for node in calls if ANNOTATION not in node.meta and is_float(node)}

    def _index(self) -> tuple[dict[Any, list[tuple[Any, Rule]]], dict[Any, list[tuple[Any, Rule]]]]:
        """Root target → (config, rule), for the rules with their own numbers and for those that follow."""
        own: dict[Any, list[tuple[Any, Rule]]] = defaultdict(list)
        following: dict[Any, list[tuple[Any, Rule]]] = defaultdict(list)
        for config in self.quantizer.configs():
            for rule in self.quantizer.table(config):
                for target in roots(rule.pattern):
                    (following if rule.follows else own)[target].append((config, rule))
        return own, following

    def _matches(self, index: Mapping[Any, list[tuple[Any, Rule]]], result: Node) -> Iterator[tuple[Rule, Match]]:
        """The acceptable match of each rule whose value is that of ``result``: an op, or the norm folded into it."""
        node = self.folded.get(result, result)
        if ANNOTATION in node.meta:
            self._note_claimed(index, node, result)
            return
        for config, rule in index.get(node.target, ()):
            seen = False
            for match in solutions(rule.pattern, result, self.constants, folded=self.folded):
                seen = True
                if self.choices[rule.anchor(match)].config != config:
                    continue
                objection = self._out_of_scope(rule, match) or self._objection(rule, match)
                if objection is None:
                    yield rule, match
                    break
                self.trials.add(node, Trial(rule.name, MATCHED, objection, size=len(match.nodes)))
            if seen:
                continue
            if (nearest := explain(rule.pattern, result, self.constants, folded=self.folded)) is not None:
                self.trials.add(node, Trial(rule.name, NEARLY, nearest.reason, missing=nearest.missing))

    def _note_claimed(self, index: Mapping[Any, list[tuple[Any, Rule]]], node: Node, result: Node) -> None:
        """Remember the rules that would match at a node which is part of another match already."""
        owner = self.trials.owner.get(node.name)
        for _, rule in index.get(node.target, ()):
            match = next(solutions(rule.pattern, result, self.constants, folded=self.folded), None)
            if match is None or (owner is not None and rule.name == owner[0] and len(match.nodes) <= len(owner[2])):
                continue
            reason = f"'{node.name}' is already part of {self._owner(node)}"
            if owner is not None:
                reason += f", which takes {', '.join(owner[2])}"
            self.trials.add(node, Trial(rule.name, MATCHED, reason, size=len(match.nodes)))

    def _out_of_scope(self, rule: Rule, match: Match) -> str | None:
        """The innermost op decides on the configuration; the others come along unless they are set to float."""
        if rule.opt_in and not self.choices[rule.anchor(match)].explicit:
            return "it is quantized only where the op or its module is set, not by a global configuration"
        if self._is_done(rule, match):
            return "its operands are quantized already"
        floats = [n for n in match.nodes if self.choices[n].config is None and self.choices[n].explicit]
        return f"'{floats[0].name}' is set to float by {self.choices[floats[0]].setting}" if floats else None

    def _objection(self, rule: Rule, match: Match) -> str | None:
        """Why this match must not be annotated."""
        for node in match.nodes:
            if ANNOTATION in node.meta:
                return f"'{node.name}' is already part of {self._owner(node)}"
            if isinstance(node.meta.get("val"), list | tuple):
                # Each tensor that is picked from a split; embedding_bag and its kin answer with several, all float.
                picked = parts(node) if rule.result is not None else []
                if (taken := next((part for part in picked if ANNOTATION in part.meta), None)) is not None:
                    return f"'{taken.name}' is already part of {self._owner(taken)}"
                reasons = map(self._not_quantizable, picked)
                if (reason := next(filter(None, reasons), None)) is not None:
                    return f"a tensor picked from '{node.name}' is {reason}"
                continue
            if (reason := self._not_quantizable(node)) is not None:
                return f"the output of '{node.name}' is {reason}"
        source = self.value_sources.source[match.root]
        if source is not Source.DATA and not rule.is_weight_only:
            return self._no_data(match.root)
        if (reason := self._operand_objection(rule, match)) is not None:
            return reason
        reasons = map(self.quantizer.objection_to_node, match.nodes)
        if (reason := next(filter(None, reasons), None)) is not None:
            return reason
        if rule.follows and not self._continues(rule, match):
            return "its input is not quantized, so there is nothing to continue"
        if (reason := rule.conflict(match)) is not None:
            return reason
        return rule.condition(match)

    def _no_data(self, node: Node) -> str:
        """What a tensor is that no float input reaches."""
        if (reason := self.value_sources.objection(node)) is not None:
            return reason
        if (variation := self.constants.variation(node)) is None:
            return "a constant, computed from parameters and buffers"
        return f"not constant: {f'it {variation.cause}' if variation.node is node else variation}"

    def _operand_objection(self, rule: Rule, match: Match) -> str | None:
        """Why an operand that the rule quantizes must stay float."""
        for name, spec in rule.operands.items():
            for producer, consumer in match.operands.get(name, ()) if spec is not None else ():
                if (reason := self.quantizer.objection_to_edge(producer, consumer)) is not None:
                    return reason
                if (reason := self._not_quantizable(producer)) is not None:
                    return f"operand '{name}' is {reason}"
                if (written := self.written.get(producer)) is not None and consumer in written.consumers:
                    return f"operand '{name}' is written in place by '{written.writer.name}', where others see it"
                if (reason := self.value_sources.objection(producer)) is not None:
                    return f"operand '{name}' ('{producer.name}') is {reason}"
        return None

    def _is_done(self, rule: Rule, match: Match) -> bool:
        """Whether an earlier quantization dealt with this match: its weight, or all it reads, is dequantized."""
        given = [p for name, spec in rule.operands.items() if spec is not None for p, _ in match.operands.get(name, ())]
        dequantized = [producer for producer in given if producer.target in DEQUANTIZE]
        weight = any(producer in self.constants for producer in dequantized)
        return weight or (len(dequantized) == len(given) > 0)

    def _not_quantizable(self, node: Node) -> str | None:
        tensor = node_tensor(node)
        if not isinstance(tensor, Tensor):
            return "not a single tensor"
        if tensor.dtype not in self.quantizer.dtypes:
            hint = ", which is not quantized here: use model.float()" if tensor.is_floating_point() else ""
            return f"a {str(tensor.dtype).removeprefix('torch.')} tensor{hint}"
        sizes: tuple[Any, ...] = tuple(tensor.shape)  # ints, and symbols for dynamic dimensions
        return "an empty tensor" if any(isinstance(size, int) and size == 0 for size in sizes) else None

    def _continues(self, rule: Rule, match: Match) -> bool:
        """Whether the producers that the rule follows are quantized: one of them, or all where the rule says so."""
        following = {name: spec for name, spec in rule.operands.items() if isinstance(spec, Follow)}
        quantized = {
            name: [
                self.is_quantized(p)
                or (spec.inputs and p.op == "placeholder" and (not spec.read or self._is_read(match.root)))
                for p, _ in match.operands.get(name, ())
            ]
            for name, spec in following.items()
        }
        every = all(all(quantized[name]) for name, spec in following.items() if spec.every)
        return every and any(any(answers) for answers in quantized.values())

    def _is_read(self, node: Node) -> bool:
        """Whether an op that is annotated reads a node as integers, perhaps behind ops of rules that follow."""
        waiting, seen = [node], {node}
        while waiting:
            current = waiting.pop()
            for user in current.users:
                if reads_integers(user, current):
                    return True
                continues = user.target in self.following or user in self.folded
                if continues and ANNOTATION not in user.meta and user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return False

    def is_quantized(self, node: Node) -> bool:
        """Whether the output of a node is, or costs nothing to have, as integers."""
        if node in self.computed:
            return True
        spec = getattr(node.meta.get(ANNOTATION), "output_qspec", None)
        return spec is not None and not getattr(spec, "is_dynamic", False)

    def _apply(self, winner: tuple[Rule, Match] | None, found: Sequence[tuple[Rule, Match]]) -> None:
        if winner is None:
            return
        rule, match = winner
        names = tuple(node.name for node in match.nodes)
        for node, annotation in self.quantizer.refine(rule, match, rule.annotations(match)).items():
            node.meta[ANNOTATION] = annotation
            self.trials.owner[node.name] = (rule.name, match.root.name, names)
        op = self.folded.get(match.root, match.root)
        self.trials.add(op, Trial(rule.name, APPLIED, size=len(names)))
        for other, smaller in found:
            if other is not rule:
                why = "comes first" if rule.follows or len(smaller.nodes) == len(names) else "takes more ops"
                reason = f"rule '{rule.name}' {why}"
                self.trials.add(op, Trial(other.name, MATCHED, reason, size=len(smaller.nodes)))
        activations = [
            producer
            for name, spec in rule.operands.items()
            for producer, _ in match.operands.get(name, ())
            if spec is not None and producer not in self.constants
        ]
        if activations and not rule.is_dynamic:
            self.computed.add(match.root)

    def _owner(self, node: Node) -> str:
        rule = getattr(node.meta[ANNOTATION], "rule", "")
        return f"rule '{rule}'" if rule else "what another quantizer annotated"

    def _reason(self, node: Node) -> str:
        """Why a float op is left float."""
        choice = self.choices[node]
        if choice.config is None:
            return f"set to float by {choice.setting}" if choice.explicit else "no configuration covers it"
        if node in self.folded:
            return f"folded into '{self.folded[node].name}', which stays float"
        source = self.value_sources.source[node]
        if source is not Source.DATA:
            return self._no_data(node)
        nearest, own = self.trials.nearest(node), self.quantizer.objection_to_node(node)
        if own is not None and (nearest is None or nearest.outcome != MATCHED or nearest.reason == own):
            return own
        reason = "" if nearest is None else f"rule '{nearest.rule}': {nearest.reason}"
        # What a whole match was refused for is more telling than why a pattern that could absorb the op did not match.
        whole = nearest is not None and nearest.outcome == MATCHED
        return reason if whole else self.quantizer.uncovered(node, choice.config) or reason
