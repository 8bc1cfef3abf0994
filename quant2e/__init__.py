"""quant2e: a quantization compiler for exported PyTorch graphs.

In: an ``nn.Module``, an ``ExportedProgram`` or a captured graph. Out: a Q/DQ graph that saves, loads and lowers.

`quantize` does it in one call; `capture`, `prepare_pt2e`, `calibrate` and `convert_pt2e` are its steps.
"""

from quant2e.annotation.config import OperatorConfig, QuantizationConfig
from quant2e.annotation.granularity import (
    Granularity,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    get_block_size,
)
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
from quant2e.annotation.pattern import Arg, constant, op
from quant2e.annotation.plan import Edge, Group, Output, Plan
from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import (
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    SharedQuantizationSpec,
)
from quant2e.calibration.calibrate import calibrate
from quant2e.calibration.data_checks import DataFinding, check_data
from quant2e.calibration.progress import ProgressLine
from quant2e.calibration.range_selection import RangeChoice, select_ranges
from quant2e.calibration.statistics import Statistics, load_statistics, rederive, save_statistics
from quant2e.convert.convert import convert_pt2e
from quant2e.errors import (
    AnnotationError,
    CalibrationError,
    CaptureError,
    FileFormatError,
    LoweringError,
    PassError,
    PlanError,
    Quant2eError,
)
from quant2e.graph.capture import capture
from quant2e.graph.modes import freeze_batch_norm
from quant2e.graph.module import (
    allow_exported_model_train_eval,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from quant2e.integer import IntegerReport, IntegerVerdict, Requantization, integer_report, to_integer
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
from quant2e.pipeline import quantize
from quant2e.prepare.prepare import prepare_pt2e, prepare_qat_pt2e
from quant2e.quantized_io import Port, QuantizedIO, quantized_io_of, with_quantized_io
from quant2e.quantized_model import QuantizedModel, load, save
from quant2e.report.encodings import Encodings
from quant2e.report.report import Report, Verdict

__all__ = [
    "AnnotationError",
    "Arg",
    "CalibrationError",
    "CaptureError",
    "DataFinding",
    "DerivedQuantizationSpec",
    "Edge",
    "EdgeOrNode",
    "Encodings",
    "FakeQuantize",
    "FakeQuantizeBase",
    "FileFormatError",
    "FixedQParamsFakeQuantize",
    "FixedQParamsObserver",
    "FixedQParamsQuantizationSpec",
    "FusedMovingAvgObsFakeQuantize",
    "Granularity",
    "Group",
    "HistogramObserver",
    "IntegerReport",
    "IntegerVerdict",
    "LearnableFakeQuantize",
    "LoweringError",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "NoopObserver",
    "ObserverBase",
    "OperatorConfig",
    "Output",
    "PassError",
    "PerAxis",
    "PerChannelHistogramObserver",
    "PerChannelMinMaxObserver",
    "PerGroup",
    "PerGroupMinMaxObserver",
    "PerRow",
    "PerTensor",
    "PerToken",
    "PlaceholderObserver",
    "Plan",
    "PlanError",
    "Port",
    "ProgressLine",
    "Quant2eError",
    "QuantizationAnnotation",
    "QuantizationConfig",
    "QuantizationSpec",
    "QuantizationSpecBase",
    "QuantizedIO",
    "QuantizedModel",
    "Quantizer",
    "RangeChoice",
    "RecordingObserver",
    "Report",
    "Requantization",
    "SharedQuantizationSpec",
    "Statistics",
    "Verdict",
    "WrapperModule",
    "allow_exported_model_train_eval",
    "annotate_input_qspec_map",
    "annotate_output_qspec",
    "bfs_trace_with_node_process",
    "calibrate",
    "capture",
    "check_data",
    "constant",
    "convert_pt2e",
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
    "freeze_batch_norm",
    "fused_per_channel_wt_fake_quant_range_neg_127_to_127",
    "fused_wt_fake_quant_range_neg_127_to_127",
    "get_block_size",
    "get_equivalent_types",
    "get_module_name_filter",
    "integer_report",
    "load",
    "load_statistics",
    "model_is_exported",
    "move_exported_model_to_eval",
    "move_exported_model_to_train",
    "op",
    "prepare_pt2e",
    "prepare_qat_pt2e",
    "quantize",
    "quantized_io_of",
    "rederive",
    "save",
    "save_statistics",
    "select_ranges",
    "to_integer",
    "update_equivalent_types_dict",
    "with_quantized_io",
]
