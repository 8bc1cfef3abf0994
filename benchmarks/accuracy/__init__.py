"""Accuracy beside float and beside peers: models, hard versions of them, what quantization costs and what mends it."""
