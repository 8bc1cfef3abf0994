"""One step of a decoder, weight-only: ours through Inductor beside OpenVINO, onnxruntime and ggml, in one process.

A model and its tokens come in; a table goes out, with milliseconds, tokens per second and the error beside each other.
"""
