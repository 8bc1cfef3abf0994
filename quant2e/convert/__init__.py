"""Convert: an observed graph becomes a Q/DQ graph, and is checked for legality."""
