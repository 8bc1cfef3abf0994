"""OpenVINO: models in its own format, an ``.xml`` with a ``.bin`` beside it, for its kernels on u8 and s8.

In: a `QuantizedModel` or a converted GraphModule. Out: an `OpenVINOProgram`, which runs in OpenVINO and is saved.
``session``: OpenVINO with the options that compute what a graph says; ``precision``: what it ran on integers;
``files``: two files that are written, and checked, as one; ``contents``: what is in them; ``lower``: the way.
"""

from lowering.openvino.lower import to_openvino
from lowering.openvino.program import OpenVINOProgram, OpenVINOReport

__all__ = ["OpenVINOProgram", "OpenVINOReport", "to_openvino"]
