"""Rounding of weights: what enters is a calibrated graph, what leaves are encodings and integers of its observers."""
