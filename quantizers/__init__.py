"""Backend quantizers, and the kit to write one.

In: a captured ATen graph. Out: the same graph, annotated. Imports quant2e only.

The kit: `Rule` (with `Same`, `Follow`, `Derived`), `RuleQuantizer`, and `ConfigurableQuantizer` for tables that are a
function of a `QuantizationConfig`. The backends: `XNNPACKQuantizer`, `X86InductorQuantizer`, `OpenVINOQuantizer`,
`Int16Quantizer` and `EmbeddingQuantizer`; `ComposableQuantizer` puts several together.
"""

from quant2e.accuracy.recipe.schemes import Numbers, Scheme, recipe
from quant2e.annotation.config import OperatorConfig, QuantizationConfig
from quant2e.cpu import InstructionSet
from quantizers.capabilities import Capabilities, Capability, Declared
from quantizers.composable import ComposableQuantizer
from quantizers.embedding import (
    EmbeddingQuantizer,
    get_embedding_operators_config,
    get_embedding_quantization_config,
)
from quantizers.int16 import Int16Quantizer, get_int16_quantization_config
from quantizers.kit.printer import annotations_text
from quantizers.kit.rule import ChosenConfig, Derived, Follow, Rule, Same
from quantizers.kit.rule_quantizer import RuleQuantizer
from quantizers.openvino import OpenVINOQuantizer
from quantizers.settings.configurable import ConfigurableQuantizer
from quantizers.torchao import TorchaoQuantizer, as_torchao
from quantizers.x86.quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
    get_x86_inductor_linear_dynamic_fp16_config,
)
from quantizers.x86.range_policy import RangePolicy
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

__all__ = [
    "Capabilities",
    "Capability",
    "ChosenConfig",
    "ComposableQuantizer",
    "ConfigurableQuantizer",
    "Declared",
    "Derived",
    "EmbeddingQuantizer",
    "Follow",
    "InstructionSet",
    "Int16Quantizer",
    "Numbers",
    "OpenVINOQuantizer",
    "OperatorConfig",
    "QuantizationConfig",
    "RangePolicy",
    "Rule",
    "RuleQuantizer",
    "Same",
    "Scheme",
    "TorchaoQuantizer",
    "X86InductorQuantizer",
    "XNNPACKQuantizer",
    "annotations_text",
    "as_torchao",
    "get_default_x86_inductor_quantization_config",
    "get_embedding_operators_config",
    "get_embedding_quantization_config",
    "get_int16_quantization_config",
    "get_symmetric_quantization_config",
    "get_x86_inductor_linear_dynamic_fp16_config",
    "recipe",
]
