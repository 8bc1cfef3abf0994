"""Observers and fake-quantizers: modules over the estimators of `quant2e.ranges`.

In: the tensors that flow past a point. Out: statistics in buffers, and an encoding when conversion asks for it.
"""
