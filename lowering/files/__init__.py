"""Program files: ``.pte``, ``.onnx``, ``.xml`` and ``.pt2`` opened for a call, whoever made them.

In: the path of a file. Out: an `OpenProgram`; files without a checksum of ours are opened in a process of their own.
"""

from lowering.files.program_file import OpenProgram, open_program

__all__ = ["OpenProgram", "open_program"]
