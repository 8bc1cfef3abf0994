"""Layers as algorithms see them: what can be changed in one, and what follows for its output."""
