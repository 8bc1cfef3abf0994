"""Types of public signatures: what functions of `quant2e` take and return, for annotations of one's own.

And what they raise or warn with that a script seldom names; `quant2e` lists what it does name. All of them can be
imported from `quant2e` as well.
"""

from quant2e.accuracy.comparison import Comparison, GroupError, OpError, OutputError
from quant2e.accuracy.recipe.settings import OperandSettings, OpSettings, RecipeRule, TensorRule
from quant2e.accuracy.sensitivity import GroupSensitivity, Sensitivity, SensitivityMethod
from quant2e.accuracy.tuning.budgets import Budget
from quant2e.accuracy.tuning.result import TuningResult
from quant2e.accuracy.tuning.search import Latency, TrialProgress
from quant2e.accuracy.tuning.space.evaluation import Evaluate
from quant2e.accuracy.tuning.space.goal import Goal
from quant2e.accuracy.tuning.space.space import Mix
from quant2e.accuracy.tuning.space.trial import TuningTrial
from quant2e.accuracy.tuning.table import TrialTable
from quant2e.accuracy.tuning.tune import TuningStrategy
from quant2e.annotation.pattern import Arg, Condition, Either, NodeEdge, Pattern
from quant2e.annotation.plan import Group, Ignored, Point
from quant2e.calibration.calibrate import Progress
from quant2e.calibration.data_checks import DataFinding, DataReport
from quant2e.calibration.feed import Transform
from quant2e.calibration.plausibility import State
from quant2e.calibration.range_selection import RangeChoice
from quant2e.errors import AccuracyError, QuantizationWarning
from quant2e.graph.captured.inputs import Inputs
from quant2e.page.section import Cell, Chart, DotChart, FlowChart, FlowNode, PageSection, RangeChart, ScatterChart
from quant2e.quantized_io import Port
from quant2e.report.algorithm_step import AlgorithmStep
from quant2e.report.chosen_range import ChosenRange
from quant2e.report.encodings import GroupEncoding
from quant2e.report.float_ops import FloatOp
from quant2e.report.tensor_range import TensorRange

__all__ = [
    "AccuracyError",
    "AlgorithmStep",
    "Arg",
    "Budget",
    "Cell",
    "Chart",
    "ChosenRange",
    "Comparison",
    "Condition",
    "DataFinding",
    "DataReport",
    "DotChart",
    "Either",
    "Evaluate",
    "FloatOp",
    "FlowChart",
    "FlowNode",
    "Goal",
    "Group",
    "GroupEncoding",
    "GroupError",
    "GroupSensitivity",
    "Ignored",
    "Inputs",
    "Latency",
    "Mix",
    "NodeEdge",
    "OpError",
    "OpSettings",
    "OperandSettings",
    "OutputError",
    "PageSection",
    "Pattern",
    "Point",
    "Port",
    "Progress",
    "QuantizationWarning",
    "RangeChart",
    "RangeChoice",
    "RecipeRule",
    "ScatterChart",
    "Sensitivity",
    "SensitivityMethod",
    "State",
    "TensorRange",
    "TensorRule",
    "Transform",
    "TrialProgress",
    "TrialTable",
    "TuningResult",
    "TuningStrategy",
    "TuningTrial",
]
