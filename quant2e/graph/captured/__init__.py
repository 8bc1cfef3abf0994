"""Captured models: how a graph is captured, held, called, switched between its modes and pickled.

In: a module or an ``ExportedProgram``. Out: a `CapturedModule`, which is called like the module it came from.
"""
