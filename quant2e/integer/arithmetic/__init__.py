"""Integer arithmetic as graph nodes: grids, requantization, division, thresholds."""
