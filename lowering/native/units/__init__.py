"""Units: which ops of a Q/DQ graph a step of a region computes together, one file for each kind of op.

In: a node of the graph. Out: a `Unit`, which writes its step; or the reason why there is none.
"""
