"""Configurable quantizer: rules with settings, global, by operator, module type, module name, node, or single edge."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch.fx import GraphModule, Node

from quant2e.accuracy.recipe.schemes import Scheme, recipe
from quant2e.annotation.config import OperatorConfig, QuantizationConfig
from quant2e.annotation.granularity import PerGroup
from quant2e.annotation.pattern import Match
from quant2e.annotation.specs import QuantizationAnnotation, QuantizationSpec, group_size_of
from quant2e.errors import AnnotationError, Quant2eError, module_path
from quant2e.graph.constants import Constants
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import node_tensor
from quant2e.observers.measuring import HistogramObserver, PerChannelMinMaxObserver, PlaceholderObserver
from quant2e.passes import run
from quantizers.kit.rule import ChosenConfig, Rule
from quantizers.kit.rule_quantizer import RuleQuantizer
from quantizers.rewrites.batches import BatchesOfOne
from quantizers.rewrites.einsum_to_linear import einsums_as_linear
from quantizers.rewrites.matmul_to_linear import products_as_linear
from quantizers.rewrites.recurrent_to_linear import RECURRENT, RecurrentAsLinear, why_whole
from quantizers.settings.buffers import annotate_buffers
from quantizers.settings.diagnostics import Coverage
from quantizers.settings.edges import EdgeSettings, edge_scope
from quantizers.settings.scopes import (
    Everything,
    Scope,
    Settings,
    name_scope,
    node_scope,
    operator_scope,
    type_scope,
)
from quantizers.settings.supported_functions import supported_functions

_BUFFER = QuantizationSpec(torch.int8, HistogramObserver, -128, 127, torch.per_tensor_affine)


class ConfigurableQuantizer(RuleQuantizer):
    """Base of the backends whose rules are a function of a `QuantizationConfig`.

    A configuration is a `QuantizationConfig`, a recipe (``"w8a8-dynamic"``, or what `recipe` returns), or ``None``,
    which leaves float. All setters return the quantizer. A later call for the same scope replaces the earlier.
    Precedence: edge, node, module name, module type, operator, global (see `quantizers.settings.scopes`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._settings = Settings()
        self._edges = EdgeSettings()
        self._buffers: dict[str, Any] = {}
        self._own_notes: list[str] = []

    def __copy__(self) -> Self:
        """One with settings of its own, which can be added to; the configurations are the same."""
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        made._settings = Settings(dict(self._settings.made), self._settings.only)
        made._edges = EdgeSettings(dict(self._edges.made))
        made._buffers, made._own_notes = dict(self._buffers), list(self._own_notes)
        return made

    # ------------------------------------------------------------ what a backend says

    has_linear: ClassVar[bool] = False
    """Whether the rules quantize linear, so that other spellings of it are worth rewriting."""
    takes_groups: ClassVar[bool] = False
    """Whether weights may have a scale for each group of neighbours in a row."""
    affine_groups: ClassVar[bool] = False
    """Whether groups of 4 bits and fewer have zero points, and scales that are bfloat16, unless a recipe says else."""
    recipes: ClassVar[Sequence[str]] = ("w8a8", "w8a8-dynamic")
    """Names of the recipes that the backend runs, for messages; variations of them may run as well."""

    @abstractmethod
    def table(self, config: Any) -> Sequence[Rule]:
        """The rules for ops of one configuration."""

    def accept(self, config: Any) -> Any:
        """The configuration as the backend can run it; raises for one that it cannot."""
        return config

    def base_config(self, *, is_dynamic: bool, is_qat: bool) -> QuantizationConfig:
        """The configuration of the backend that recipes are variations of.

        Here: int8 affine activations, int8 symmetric weights per output channel.
        Raises `Quant2eError` for a kind that the backend has no configuration of.
        """
        if is_qat:
            raise Quant2eError(f"{type(self).__name__} has no configuration for quantization-aware training")
        return _base_config(is_dynamic)

    def uncovered(self, node: Node, config: Any) -> str:
        if node.target in RECURRENT and self.has_linear:
            return self._why_whole(node, config)
        reason = super().uncovered(node, config)
        is_dynamic = getattr(config.input_activation, "is_dynamic", False)
        return reason.replace("no rule covers", "no dynamic rule covers") if is_dynamic else reason

    def _why_whole(self, node: Node, config: Any) -> str:
        """Why a recurrent layer stays whole, and float."""
        if not _at_run_time(config):
            dynamic = next((name for name in self.recipes if "dynamic" in name), "w8a8-dynamic")
            place = f"set_module_name('{path}'" if (path := module_path(node)) else f"set_node('{node.name}'"
            return (
                "recurrent layers are quantized at run time only: give it a dynamic configuration, "
                f"{place}, '{dynamic}')"
            )
        return why_whole(node, Constants(node.graph)) or f"a {_dtype(node)} layer stays whole"

    def _has_dtype(self, node: Node) -> bool:
        return _dtype(node) in self.dtypes

    # ------------------------------------------------------------ what a user says

    def set_global(self, quantization_config: Any) -> Self:
        """Everything that no other setting covers."""
        return self._set(Everything(), quantization_config)

    def set_module_name(self, module_name: str | re.Pattern[str], quantization_config: Any) -> Self:
        r"""The module of that dotted path, and what is inside it.

        ``"blocks.*.up"`` is a glob, whose wildcards match dots as well; ``"re:blocks\.[0-3]\..*"`` and a compiled
        pattern are regular expressions for the whole path. Either names the outermost modules it matches.
        """
        return self._set(name_scope(module_name), quantization_config)

    def set_module_type(self, module_type: type | str, quantization_config: Any) -> Self:
        """Modules of exactly that class, and what is inside them; a class, its qualified name, or its bare name."""
        return self._set(type_scope(module_type), quantization_config)

    def set_operator_type(self, operator_type: Any, quantization_config: Any) -> Self:
        """Ops of that kind: an ATen overload or packet, or a function such as ``torch.nn.functional.linear``."""
        return self._set(operator_scope(operator_type), quantization_config)

    def set_object_type(self, object_type: Any, quantization_config: Any) -> Self:
        """A module type or an operator, whichever ``object_type`` is."""
        if isinstance(object_type, type | str):
            return self.set_module_type(object_type, quantization_config)
        return self.set_operator_type(object_type, quantization_config)

    def set_node(self, node: str | Node | Callable[[Node], bool], quantization_config: Any) -> Self:
        """One node of the captured graph, by name, or all nodes that a predicate answers True for.

        A predicate is asked about every call_function node, possibly more than once.
        """
        return self._set(node_scope(node), quantization_config)

    def set_edge(
        self,
        producer: str | Node | Callable[[Node], bool],
        consumer: str | Node | Callable[[Node], bool],
        quantization_config: Any,
    ) -> Self:
        """The use of one node's tensor by another, each given as for `set_node`; see `quantizers.settings.edges`.

        Also takes a `QuantizationSpec`. Of a configuration the spec of activations is used, or that of weights where
        the tensor is a constant.
        """
        is_spec = hasattr(quantization_config, "dtype")
        self._edges.put(
            edge_scope(producer, consumer), quantization_config if is_spec else self._checked(quantization_config)
        )
        return self

    def set_buffer(self, name: str, spec: Any = None) -> Self:
        """A buffer that the model writes to, a cache of keys say, as integers; by its path. None are by default.

        ``spec``: a `QuantizationSpec` per tensor; None: int8, affine, its range by a histogram of what is written.
        What is written is quantized, what is read dequantized, and the initial value rounded in advance.
        """
        wanted = _BUFFER if spec is None else spec
        if getattr(wanted, "is_dynamic", False) or getattr(wanted, "ch_axis", None) is not None:
            raise AnnotationError(f"the buffer '{name}' has one scale, known in advance: give a spec per tensor")
        self._buffers[name] = wanted
        return self

    def set_filter_function(self, filter_fn: Callable[[Node], bool]) -> Self:
        """Quantize only what ``filter_fn`` answers True for. It is asked about the op that computes, not what is fused
        with it.
        """
        self._settings.only = filter_fn
        return self

    def get_global_quantization_config(self) -> Any:
        """What `set_global` was given, as the backend took it; None before."""
        return self._settings.everywhere

    # PT2E's names, of the quantizers for Inductor and of QConfigMapping.

    def set_module_name_qconfig(self, module_name: str | re.Pattern[str], quantization_config: Any) -> Self:
        """`set_module_name`, under the name that PT2E's quantizers for Inductor have for it."""
        return self.set_module_name(module_name, quantization_config)

    def set_module_type_qconfig(self, module_type: type | str, quantization_config: Any) -> Self:
        """`set_module_type`, under the name that PT2E's quantizers for Inductor have for it."""
        return self.set_module_type(module_type, quantization_config)

    def set_function_type_qconfig(self, function_type: Any, quantization_config: Any) -> Self:
        """`set_operator_type`, under the name that PT2E's quantizers for Inductor have for it."""
        return self.set_operator_type(function_type, quantization_config)

    def set_module_name_regex(self, module_name_regex: str, quantization_config: Any) -> Self:
        """`set_module_name` with a regular expression, under the name that QConfigMapping has for it."""
        return self.set_module_name(f"re:{module_name_regex}", quantization_config)

    # ------------------------------------------------------------ the quantizer's interface

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Spell products with a constant weight as linear, write recurrent layers out step by step, and put single
        images in batches; where settings say so.
        """

        def is_covered(node: Node) -> bool:
            return self.choose(node).config is not None

        def is_written_out(node: Node) -> bool:
            config = self.choose(node).config
            if config is None or not self.has_linear or not _at_run_time(config) or not self._has_dtype(node):
                return False
            self._settings.wholes[node.name] = self._settings.ranked(node)
            return True

        self._settings.wholes.clear()
        run(model, (RecurrentAsLinear(is_written_out),))
        spellings = (products_as_linear, einsums_as_linear) if self.has_linear else ()
        products = [kind(model.graph, is_covered) for kind in spellings]
        run(model, (*products, BatchesOfOne(is_covered)))
        return model

    def choose(self, node: Node) -> ChosenConfig:
        return self._settings.choose(node)

    def configs(self) -> Sequence[Any]:
        return self._settings.configs()

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate what the settings cover. Raises `AnnotationError` for settings that match nothing."""
        coverage = Coverage(self._settings, model)
        absent, lines = coverage.unused()
        if lines:
            raise AnnotationError(f"{type(self).__name__}: " + "; ".join(lines))
        self._edges.bind(model)
        super().annotate(model)
        annotate_buffers(model, self._buffers)
        about = [*absent, *coverage.notes(self.reason), *self._edges.notes()]
        self.notes = [*dict.fromkeys([*self._own_notes, *self.notes_on_configs(), *about])]
        return model

    def notes_on_configs(self) -> Sequence[str]:
        """What the user should know about the configurations in use."""
        return ()

    def objection_to_edge(self, producer: Node, consumer: Node) -> str | None:
        return self._edges.objection(producer, consumer)

    def refine(
        self, rule: Rule, match: Match, made: dict[Node, QuantizationAnnotation]
    ) -> dict[Node, QuantizationAnnotation]:
        if not self._edges.made:
            return made
        return self._edges.refine(rule, match, made, partial(self._edge_spec, self.choose(rule.anchor(match)).config))

    def _edge_spec(self, config: Any, given: Any, constant: bool) -> Any:
        """The spec of an edge that the user set, into an op of ``config``."""
        operand = "weight" if constant else "input_activation"
        spec = given if hasattr(given, "dtype") else getattr(given, operand)
        if spec is None:
            raise AnnotationError(f"the configuration of an edge has no {operand}, which the edge needs: {given}")
        self.accept(replace(config, **{operand: spec}))
        return spec

    def _set(self, scope: Scope, config: Any) -> Self:
        self._settings.put(scope, self._checked(config))
        return self

    def _checked(self, config: Any) -> Any:
        if config is None:
            return None
        if isinstance(config, str | Scheme):
            return self._resolved(recipe(config) if isinstance(config, str) else config)
        if not hasattr(config, "input_activation") or not hasattr(config, "weight"):
            raise AnnotationError(
                f"{config!r} is not a configuration: give a QuantizationConfig, a recipe such as "
                f"'{self.recipes[0]}', or None for float"
            )
        return self._accepted(config)

    def _accepted(self, config: Any) -> Any:
        if not self.takes_groups and (size := group_size_of(config.weight)) is not None:
            raise AnnotationError(
                f"weights in groups of {size}: the kernels of this backend know one scale per output channel at most"
            )
        return self.accept(config)

    def _resolved(self, scheme: Scheme) -> Any:
        """The configuration that a scheme means for this backend. Raises what says which recipes there are instead."""
        try:
            base = self.base_config(is_dynamic=scheme.is_dynamic, is_qat=scheme.is_qat)
            return self._accepted(self._with_group_defaults(scheme).applied_to(base))
        except Quant2eError as error:
            instead = ", ".join(f"'{name}'" for name in self.recipes)
            raise AnnotationError(f"{type(self).__name__} does not run {scheme}: {error}. It runs {instead}") from error

    def _with_group_defaults(self, scheme: Scheme) -> Scheme:
        """What the scheme leaves open of groups of few bits, as `affine_groups` says."""
        weight = scheme.weight
        if not self.affine_groups or weight is None or weight.bits > 4 or not isinstance(weight.granularity, PerGroup):
            return scheme
        symmetric = False if weight.symmetric is None else weight.symmetric
        scale_dtype = torch.bfloat16 if weight.scale_dtype is None else weight.scale_dtype
        return replace(scheme, weight=replace(weight, symmetric=symmetric, scale_dtype=scale_dtype))

    # ------------------------------------------------------------ what PT2E's quantizers answer

    @classmethod
    def get_supported_operators(cls) -> list[OperatorConfig]:
        """The default configurations, each with what its rules match: lists of functions that follow each other."""
        return [
            OperatorConfig(config, cls.get_supported_operator_for_quantization_config(config))
            for config in cls.get_supported_quantization_configs()
        ]

    @classmethod
    def get_supported_quantization_configs(cls) -> list[QuantizationConfig]:
        """The default configurations: static and dynamic, calibrated and trained. Others may run as well."""
        quantizer, found = cls(), []
        for is_dynamic, is_qat in ((False, False), (False, True), (True, False), (True, True)):
            with suppress(Quant2eError):  # a kind that the backend has no configuration of
                config = quantizer.base_config(is_dynamic=is_dynamic, is_qat=is_qat)
                if config not in found:
                    found.append(config)
        return found

    @classmethod
    def get_supported_operator_for_quantization_config(
        cls, quantization_config: QuantizationConfig | None
    ) -> list[list[Callable[..., Any]]]:
        """Lists of functions that follow each other, as the rules for a configuration match them; of ``None``, for all
        default configurations. Raises `AnnotationError` for a configuration that the backend cannot run.
        """
        quantizer = cls()
        configs = [quantization_config] if quantization_config else cls.get_supported_quantization_configs()
        return supported_functions(rule for config in configs for rule in quantizer.table(quantizer.accept(config)))


def _at_run_time(config: Any) -> bool:
    """Whether no activation has parameters of its own from calibration: dynamic or weight-only configurations."""
    activation = config.input_activation
    return activation is None or bool(getattr(activation, "is_dynamic", False))


def _dtype(node: Node) -> torch.dtype | None:
    """The dtype that an op computes in."""
    tensor = node_tensor(operand(node, 0))
    return None if tensor is None else tensor.dtype


def _base_config(is_dynamic: bool) -> QuantizationConfig:
    observer = PlaceholderObserver if is_dynamic else HistogramObserver
    activation = QuantizationSpec(
        torch.int8, observer.with_args(), -128, 127, torch.per_tensor_affine, is_dynamic=is_dynamic
    )
    weight = QuantizationSpec(
        torch.int8, PerChannelMinMaxObserver.with_args(), -127, 127, torch.per_channel_symmetric, 0
    )
    return QuantizationConfig(activation, None if is_dynamic else activation, weight, None)
