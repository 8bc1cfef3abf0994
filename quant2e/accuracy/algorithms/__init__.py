"""Algorithms that mend accuracy: rewrites of a captured graph, or of the weights of a calibrated one.

In one call, guarded: ``quantize(..., algorithms=["equalize", {"smooth": {"alpha": 0.5}}])``, or ``algorithms="auto"``.
Step by step: the functions below, each of which returns a new graph and leaves the one that it was given as it is.
"""

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.awq import Awq, awq
from quant2e.accuracy.algorithms.channels.scaling import channels_left
from quant2e.accuracy.algorithms.correct_bias import CorrectBias, correct_bias
from quant2e.accuracy.algorithms.equalize import Equalize, equalize
from quant2e.accuracy.algorithms.fit_activation_ranges import FittedActivationRanges, fit_activation_ranges
from quant2e.accuracy.algorithms.fit_weight_ranges import FittedWeightRanges, fit_weight_ranges
from quant2e.accuracy.algorithms.gptq import GPTQ, gptq
from quant2e.accuracy.algorithms.learn_biases import LearnedBiases, learn_biases
from quant2e.accuracy.algorithms.reestimate_batch_norm import ReestimateBatchNorm, reestimate_batch_norm
from quant2e.accuracy.algorithms.registry import AlgorithmItem, Algorithms, read_algorithms
from quant2e.accuracy.algorithms.round_adaptively import AdaptiveRounding, round_adaptively
from quant2e.accuracy.algorithms.smooth import Smooth, smooth
from quant2e.accuracy.algorithms.smooth_sums import SmoothSums, smooth_sums

__all__ = [
    "GPTQ",
    "AdaptiveRounding",
    "Algorithm",
    "AlgorithmItem",
    "Algorithms",
    "Awq",
    "Context",
    "CorrectBias",
    "Equalize",
    "FittedActivationRanges",
    "FittedWeightRanges",
    "LearnedBiases",
    "ReestimateBatchNorm",
    "Smooth",
    "SmoothSums",
    "Stage",
    "awq",
    "channels_left",
    "correct_bias",
    "equalize",
    "fit_activation_ranges",
    "fit_weight_ranges",
    "gptq",
    "learn_biases",
    "read_algorithms",
    "reestimate_batch_norm",
    "round_adaptively",
    "smooth",
    "smooth_sums",
]
