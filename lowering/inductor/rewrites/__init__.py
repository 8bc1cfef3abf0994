"""Rewrites of a Q/DQ graph into calls of int8 kernels. Each keeps the eager result."""
