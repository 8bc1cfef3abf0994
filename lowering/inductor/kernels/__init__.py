"""Kernels of our own, built on the user's machine: engines beside those that torch brings."""
