"""The strict reader of ``.pt2`` files: the bytes of a file enter, a captured graph leaves, nothing of the file runs.

Bytes become records (`archive`), records become JSON and tensors, JSON is checked against a schema, and only then is
a graph built from it, of ops in a table and of names that are plain identifiers.
"""
