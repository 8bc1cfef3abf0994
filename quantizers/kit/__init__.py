"""The kit to write a backend quantizer: rules over patterns, conditions on matches, and explanations."""
