"""The mathematics of ranges: statistics of tensors, and the scales and zero points that follow from them.

In: tensors, or states of estimators. Out: new states, ranges and quantization parameters. Pure functions; no graph, no
module.
"""
