"""The kit to write a backend quantizer, and the backends.

In: a captured ATen graph. Out: the same graph, annotated. Imports quant2e only.
"""
