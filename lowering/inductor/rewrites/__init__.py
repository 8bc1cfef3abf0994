"""Rewrites of a Q/DQ graph into what Inductor's int8 patterns match. Each keeps the eager result."""
