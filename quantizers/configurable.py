"""A `RuleQuantizer` that users configure: globally, by module name, module type, operator, or with a filter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

from torch.fx import GraphModule, Node

from quant2e.errors import AnnotationError
from quantizers.products import products_as_linear
from quantizers.rule import Rule
from quantizers.rule_quantizer import RuleQuantizer
from quantizers.scope import Choice, Settings, targets_of, type_name


class ConfigurableQuantizer(RuleQuantizer):
    """Base of the backends whose rules are a function of a `QuantizationConfig`.

    All setters return the quantizer. A later call for the same name replaces the earlier; ``None`` leaves float.
    Precedence: module name, module type, operator, global (see `quantizers.scope`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._settings = Settings()
        self._own_notes: list[str] = []

    # ------------------------------------------------------------ what a backend says

    has_linear: ClassVar[bool] = False
    """Whether the rules quantize linear, so that other spellings of it are worth rewriting."""

    @abstractmethod
    def table(self, config: Any) -> Sequence[Rule]:
        """The rules for ops of one configuration."""

    def accept(self, config: Any) -> Any:
        """The configuration as the backend can run it; raises for one that it cannot."""
        return config

    def uncovered(self, node: Node, config: Any) -> str:
        reason = super().uncovered(node, config)
        is_dynamic = getattr(config.input_activation, "is_dynamic", False)
        return reason.replace("no rule covers", "no dynamic rule covers") if is_dynamic else reason

    # ------------------------------------------------------------ what a user says

    def set_global(self, quantization_config: Any) -> Self:
        """Everything that no other setting covers."""
        self._settings.everywhere = self._checked(quantization_config)
        return self

    def set_module_name(self, module_name: str, quantization_config: Any) -> Self:
        """The module of that dotted path, and what is inside it."""
        self._settings.names[module_name] = self._checked(quantization_config)
        return self

    def set_module_type(self, module_type: type | str, quantization_config: Any) -> Self:
        """Modules of exactly that class, and what is inside them; a class, its qualified name, or its bare name."""
        if not isinstance(module_type, type | str):
            raise AnnotationError(f"{module_type!r} is not a module type; for functions there is set_operator_type")
        self._settings.types[type_name(module_type)] = self._checked(quantization_config)
        return self

    def set_operator_type(self, operator_type: Any, quantization_config: Any) -> Self:
        """Ops of that kind: an ATen overload or packet, or a function such as ``torch.nn.functional.linear``."""
        spelled = str(getattr(operator_type, "__name__", operator_type))
        self._settings.operators[targets_of(operator_type)] = (spelled, self._checked(quantization_config))
        return self

    def set_object_type(self, object_type: Any, quantization_config: Any) -> Self:
        """A module type or an operator, whichever ``object_type`` is."""
        if isinstance(object_type, type | str):
            return self.set_module_type(object_type, quantization_config)
        return self.set_operator_type(object_type, quantization_config)

    def set_filter_function(self, filter_fn: Callable[[Node], bool]) -> Self:
        """Quantize only what ``filter_fn`` answers True for. It is asked about the op that computes, not what is fused."""
        self._settings.only = filter_fn
        return self

    # ------------------------------------------------------------ the quantizer's interface

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Spell products with a constant weight as linear, where a configuration covers them."""
        if self.has_linear:
            products_as_linear(model, lambda node: self.choose(node).config is not None)
        return model

    def choose(self, node: Node) -> Choice:
        return self._settings.choose(node)

    def configs(self) -> Sequence[Any]:
        return self._settings.configs()

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate what the settings cover. Raises `AnnotationError` for settings that match nothing."""
        absent, lines = self._settings.unmatched(model)
        if lines:
            raise AnnotationError(f"{type(self).__name__}: " + "; ".join(lines))
        self.notes = [*dict.fromkeys([*self._own_notes, *self.notes_on_configs(), *absent])]
        return super().annotate(model)

    def notes_on_configs(self) -> Sequence[str]:
        """What the user should know about the configurations in use."""
        return ()

    def _checked(self, config: Any) -> Any:
        return None if config is None else self.accept(config)
