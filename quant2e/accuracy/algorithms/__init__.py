"""Algorithms that mend accuracy: rewrites of a captured graph, or of the weights of a calibrated one."""
