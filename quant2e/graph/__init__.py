"""The graph layer: what may be asked about an ATen graph, and how it is edited.

In: a GraphModule of ATen ops. Out: analyses of its nodes (constants, effects, mutation, data movement), and new nodes.
"""
