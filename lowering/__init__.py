"""From the portable Q/DQ graph to something that runs: Inductor, ExecuTorch, ONNX.

In: a `QuantizedModel` or a converted GraphModule. Out: a callable or a program file, checked against the graph it came from.
"""
