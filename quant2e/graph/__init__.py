"""A captured ATen graph: how it is made, what may be asked about it, and how it is edited.

In: a module or an ``ExportedProgram``. Out: a `CapturedModule`, and the analyses and edits that every later stage uses.
"""
