"""Factors of channels: where they can be moved between the weights of a graph, which ones pay, and moving them."""
