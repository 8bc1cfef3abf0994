"""Rewrites that quantizers do before they annotate, one per file. Each keeps the float result."""
