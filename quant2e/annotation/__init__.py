"""What a backend asks for: specs, annotations, patterns, and the plan they are resolved into.

In: a graph that a quantizer has annotated. Out: a `Plan`, an immutable table of points and groups.
"""
