"""Kernels of int8 regions: the C++ in this folder, the op that runs a plan, and how plans and weights are written.

In: steps and constant tensors. Out: what ``torch.ops.quant2e.int8_region`` is called with. ``README.md``
explains the C++.
"""
