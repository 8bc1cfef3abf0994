"""Names that scripts written for PT2E import.

Observers, fake-quantizers, granularities and annotation functions, spelled as in PT2E. All of them can be imported from
`quant2e` as well, which lists only what a new program needs.
"""

from quant2e.annotation.config import OperatorConfig
from quant2e.annotation.granularity import Granularity, PerAxis, PerGroup, PerRow, PerTensor, PerToken, get_block_size
from quant2e.annotation.helpers import (
    WrapperModule,
    annotate_input_qspec_map,
    annotate_output_qspec,
    get_module_name_filter,
    model_is_exported,
)
from quant2e.annotation.partitions import (
    bfs_trace_with_node_process,
    find_sequential_partitions,
    get_equivalent_types,
    update_equivalent_types_dict,
)
from quant2e.annotation.specs import QuantizationSpecBase
from quant2e.graph.captured.module import (
    allow_exported_model_train_eval,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from quant2e.observers.base import ObserverFactory
from quant2e.observers.defaults import (
    default_dynamic_fake_quant,
    default_embedding_fake_quant,
    default_embedding_fake_quant_4bit,
    default_fake_quant,
    default_fixed_qparams_range_0to1_fake_quant,
    default_fixed_qparams_range_neg1to1_fake_quant,
    default_fused_act_fake_quant,
    default_fused_per_channel_wt_fake_quant,
    default_fused_wt_fake_quant,
    default_histogram_fake_quant,
    default_per_channel_weight_fake_quant,
    default_weight_fake_quant,
    fused_per_channel_wt_fake_quant_range_neg_127_to_127,
    fused_wt_fake_quant_range_neg_127_to_127,
)
from quant2e.observers.fake_quant import (
    FakeQuantize,
    FakeQuantizeBase,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from quant2e.observers.learned_fake_quant import LearnableFakeQuantize, disable_range_learning, enable_range_learning
from quant2e.observers.measuring import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    NoopObserver,
    ObserverBase,
    PerChannelHistogramObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    RecordingObserver,
    default_dynamic_quant_observer,
    default_histogram_observer,
    default_observer,
    default_per_channel_weight_observer,
    default_placeholder_observer,
    default_weight_observer,
)
from quant2e.observers.per_group import PerGroupMinMaxObserver
from quant2e.observers.uniform import ObserverOptions, UniformQuantizationObserverBase
from quant2e.ranges.minmax import Range
from quant2e.ranges.qparams import NumberFormat

__all__ = [
    "FakeQuantize",
    "FakeQuantizeBase",
    "FixedQParamsFakeQuantize",
    "FixedQParamsObserver",
    "FusedMovingAvgObsFakeQuantize",
    "Granularity",
    "HistogramObserver",
    "LearnableFakeQuantize",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "NoopObserver",
    "NumberFormat",
    "ObserverBase",
    "ObserverFactory",
    "ObserverOptions",
    "OperatorConfig",
    "PerAxis",
    "PerChannelHistogramObserver",
    "PerChannelMinMaxObserver",
    "PerGroup",
    "PerGroupMinMaxObserver",
    "PerRow",
    "PerTensor",
    "PerToken",
    "PlaceholderObserver",
    "QuantizationSpecBase",
    "Range",
    "RecordingObserver",
    "UniformQuantizationObserverBase",
    "WrapperModule",
    "allow_exported_model_train_eval",
    "annotate_input_qspec_map",
    "annotate_output_qspec",
    "bfs_trace_with_node_process",
    "default_dynamic_fake_quant",
    "default_dynamic_quant_observer",
    "default_embedding_fake_quant",
    "default_embedding_fake_quant_4bit",
    "default_fake_quant",
    "default_fixed_qparams_range_0to1_fake_quant",
    "default_fixed_qparams_range_neg1to1_fake_quant",
    "default_fused_act_fake_quant",
    "default_fused_per_channel_wt_fake_quant",
    "default_fused_wt_fake_quant",
    "default_histogram_fake_quant",
    "default_histogram_observer",
    "default_observer",
    "default_per_channel_weight_fake_quant",
    "default_per_channel_weight_observer",
    "default_placeholder_observer",
    "default_weight_fake_quant",
    "default_weight_observer",
    "disable_fake_quant",
    "disable_observer",
    "disable_range_learning",
    "enable_fake_quant",
    "enable_observer",
    "enable_range_learning",
    "find_sequential_partitions",
    "fused_per_channel_wt_fake_quant_range_neg_127_to_127",
    "fused_wt_fake_quant_range_neg_127_to_127",
    "get_block_size",
    "get_equivalent_types",
    "get_module_name_filter",
    "model_is_exported",
    "move_exported_model_to_eval",
    "move_exported_model_to_train",
    "update_equivalent_types_dict",
]
