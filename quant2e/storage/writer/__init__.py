"""Writing of ``.pt2`` files.

Enters: a graph in which every value is known. Leaves: the records of an exported program, in an archive.
"""
