"""Prepare: a captured graph and a quantizer become an observed graph, for calibration or for training."""
