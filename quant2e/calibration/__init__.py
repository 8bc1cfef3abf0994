"""Calibrate: data runs through an observed graph; its statistics stay, the data does not."""
