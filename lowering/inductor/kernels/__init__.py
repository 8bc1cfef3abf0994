"""Kernel engines, and kernels of our own that are built on the user's machine."""
